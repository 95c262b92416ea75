"""The step of the optimizer: norm, clipping, Adam, the new weights.

megatron-core's own step waits for the GPU to learn the norm, and goes over the weights several times. On GPUs the same
is done here in one pass, and the host reads nothing. State and sharding stay those of megatron-core's distributed
optimizer around Transformer Engine's Adam, so checkpoints do not know the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import l2_norm_impl, multi_tensor_applier
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

Update = Callable[[], Tensor]
"""Updates the weights from their gradients; returns the gradient norm before clipping, [] on the device."""


def update_of(optimizer: MegatronOptimizer) -> Update:
    """The fused update, where it holds, otherwise megatron-core's own step.

    It holds for Transformer Engine's Adam in distributed optimizers, on gradients in fp32.
    """
    singles = single_optimizers(optimizer)
    if all(_can_be_fused(single) for single in singles):
        return FusedUpdate(singles)

    def plain() -> Tensor:
        _, norm, _ = optimizer.step()
        optimizer.zero_grad()
        for single in singles:
            if isinstance(single, DistributedOptimizer) and single.ddp_config.overlap_param_gather:
                _gather(single)
        return torch.tensor(norm, dtype=torch.float64)

    return plain


def _can_be_fused(optimizer: Any) -> bool:
    if not isinstance(optimizer, DistributedOptimizer):
        return False
    if type(optimizer.optimizer).__name__ != "FusedAdam":
        return False
    # Then the optimizer's gradients are the buffers' own memory; of others megatron-core makes copies in each step.
    return all(buffer.grad_dtype == torch.float32 for buffer in optimizer.buffers)


def single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that megatron-core chains, or the one that it has."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _gather(optimizer: DistributedOptimizer) -> None:
    """The parameters whole on every rank, now.

    Averages, evaluations and checkpoints read them before a next forward pass would gather them.
    """
    for chunk in optimizer.model_chunks:
        chunk.start_param_sync(force_sync=optimizer.ddp_config.overlap_param_gather)


class _Launch(NamedTuple):
    """A kernel's share of the update."""

    group: dict[str, Any]
    """Adam's parameter group: its rates and its step."""
    blocks: Tensor
    """The table of `kernels.optimizer.update`."""
    writes: bool
    """The bf16 copies of the weights are written too."""


class FusedUpdate:
    """Clipping, Adam and the bf16 weights by one kernel for each group of parameters.

    A norm that is not finite changes nothing.
    """

    def __init__(self, optimizers: list[Any]) -> None:
        self._optimizers = optimizers
        self._launches: list[_Launch] = []
        self._gradients: list[Tensor] = []
        """What counts in the norm: no copy of a parameter twice."""

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One step; the addresses are taken at the first, when a checkpoint has been loaded."""
        if not self._launches:
            self._prepare()
        norm = self._norm()
        from dfmspec.trainer.ops.kernels.optimizer import update

        clip = self._optimizers[0].config.clip_grad or float("inf")
        for group, blocks, writes in self._launches:
            group["step"] = group.get("step", 0) + 1
            update(
                blocks,
                norm,
                clip=clip,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                betas=group["betas"],
                eps=group["eps"],
                step=group["step"],
                write=writes,
            )
        for single in self._optimizers:
            _gather(single)
        return norm

    def _norm(self) -> Tensor:
        """The norm of all ranks' gradients, [] on the device."""
        squares = torch.zeros(1, device="cuda")
        if self._gradients:
            overflow = torch.zeros(1, dtype=torch.int, device="cuda")
            norm, _ = multi_tensor_applier(l2_norm_impl, overflow, [self._gradients], False)
            squares = norm**2
        dist.all_reduce(squares, group=self._optimizers[0].get_grad_stats_parallel_group())
        return squares.sqrt().squeeze()

    def _prepare(self) -> None:
        for single in self._optimizers:
            single.prepare_grads()
            self._gradients += single.get_main_grads_for_grad_norm()
            groups = zip(
                single.optimizer.param_groups,
                single.shard_fp32_from_float16_groups,
                single.shard_float16_groups,
                single.shard_fp32_groups,
                strict=True,
            )
            for group, mains, halves, singles in groups:
                none = [None] * len(singles)
                self._add_launch(single.optimizer, group, mains, halves)
                self._add_launch(single.optimizer, group, singles, none)

    def _add_launch(
        self, adam: Any, group: dict[str, Any], weights: Sequence[Tensor], copies: Sequence[Tensor | None]
    ) -> None:
        """The shards of a parameter group in fp32, each with its bf16 copy or None."""
        rows: list[tuple[int, ...]] = []
        for weight, copy in zip(weights, copies, strict=True):
            rows += _rows(adam, weight, copy)
        if rows:
            blocks = torch.tensor(rows, device="cuda")
            has_copies = copies[0] is not None
            self._launches.append(_Launch(group, blocks, has_copies))


def _rows(adam: Any, weight: Tensor, copy: Tensor | None) -> Iterator[tuple[int, ...]]:
    """The rows of `kernels.optimizer.update`'s table for one shard of a parameter.

    Raises:
        RuntimeError: the shard does not lie on 16 bytes.
    """
    from dfmspec.trainer.ops.kernels.optimizer import UPDATE_BLOCK

    # Where the shard, its gradient, its moments and its copy start.
    if not adam.state[weight]:
        adam.initialize_state(weight, store_param_remainders=False)
    state = adam.state[weight]
    tensors = (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])
    addresses = [tensor.data_ptr() for tensor in tensors]
    half = copy.data_ptr() if copy is not None else 0
    if any(address % 16 for address in (*addresses, half)):
        raise RuntimeError("a shard of megatron-core's buffers does not lie on 16 bytes")

    # A row for each block: four bytes a value in fp32, two in bf16.
    size = weight.numel()
    for start in range(0, size, UPDATE_BLOCK):
        in_fp32 = [address + 4 * start for address in addresses]
        in_bf16 = half + 2 * start
        values = min(UPDATE_BLOCK, size - start)
        yield *in_fp32, in_bf16, values
