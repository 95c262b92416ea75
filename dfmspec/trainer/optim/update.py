"""The step of the optimizer: norm, clipping, Adam, the new weights.

megatron-core's own step waits for the GPU to learn the norm, and goes over the weights several times. On GPUs the same
is done here in one pass, and the host reads nothing. State and sharding stay those of megatron-core's distributed optimizer
around Transformer Engine's Adam, so checkpoints do not know the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    """The fused update, where it holds: Transformer Engine's Adam in distributed optimizers, on gradients in fp32. Otherwise megatron-core's own step."""
    singles = single_optimizers(optimizer)
    if all(isinstance(single, DistributedOptimizer) and type(single.optimizer).__name__ == "FusedAdam" and _in_fp32(single) for single in singles):
        return FusedUpdate(singles)

    def plain() -> Tensor:
        _, norm, _ = optimizer.step()
        optimizer.zero_grad()
        for single in singles:
            if isinstance(single, DistributedOptimizer) and single.ddp_config.overlap_param_gather:
                _gather(single)
        return torch.tensor(norm, dtype=torch.float64)

    return plain


def _in_fp32(optimizer: DistributedOptimizer) -> bool:
    """Whether the optimizer's gradients are the buffers' own memory; of others megatron-core makes copies in each step."""
    return all(buffer.grad_dtype == torch.float32 for buffer in optimizer.buffers)


def single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Those that megatron-core chains, or the one that it has."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _gather(optimizer: DistributedOptimizer) -> None:
    """The parameters whole on every rank, now: averages, evaluations and checkpoints read them before a next forward pass would gather them."""
    for chunk in optimizer.model_chunks:
        chunk.start_param_sync(force_sync=optimizer.ddp_config.overlap_param_gather)


class _Launch(NamedTuple):
    group: dict[str, Any]
    blocks: Tensor
    writes: bool


class FusedUpdate:
    """Clipping, Adam and the bf16 weights by one kernel for each group of parameters; a norm that is not finite changes nothing."""

    def __init__(self, optimizers: list[Any]) -> None:
        self._optimizers = optimizers
        self._launches: list[_Launch] = []
        self._gradients: list[Tensor] = []
        """Those that count in the norm: no copy of a parameter twice."""

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """One step; the addresses are taken at the first, when a checkpoint has been loaded."""
        if not self._launches:
            self._prepare()
        norm = self._norm()
        from dfmspec.trainer.ops.kernels.optimizer import update

        for group, blocks, writes in self._launches:
            group["step"] = group.get("step", 0) + 1
            update(
                blocks, norm, clip=self._optimizers[0].config.clip_grad or float("inf"), lr=group["lr"], weight_decay=group["weight_decay"],
                betas=group["betas"], eps=group["eps"], step=group["step"], write=writes,
            )  # fmt: skip
        for single in self._optimizers:
            _gather(single)
        return norm

    def _norm(self) -> Tensor:
        squares = torch.zeros(1, device="cuda")
        if self._gradients:
            squares = multi_tensor_applier(l2_norm_impl, torch.zeros(1, dtype=torch.int, device="cuda"), [self._gradients], False)[0] ** 2
        dist.all_reduce(squares, group=self._optimizers[0].get_grad_stats_parallel_group())
        return squares.sqrt().squeeze()

    def _prepare(self) -> None:
        for single in self._optimizers:
            single.prepare_grads()
            self._gradients += single.get_main_grads_for_grad_norm()
            groups = zip(
                single.optimizer.param_groups, single.shard_fp32_from_float16_groups, single.shard_float16_groups, single.shard_fp32_groups, strict=True
            )
            for group, mains, halves, singles in groups:
                for weights, copies in ((mains, halves), (singles, [None] * len(singles))):
                    rows = [row for weight, copy in zip(weights, copies, strict=True) for row in _rows(single.optimizer, weight, copy)]
                    if rows:
                        self._launches.append(_Launch(group, torch.tensor(rows, device="cuda"), copies[0] is not None))


def _rows(adam: Any, weight: Tensor, copy: Tensor | None) -> Iterator[tuple[int, ...]]:
    """The rows of `kernels.optimizer.update`'s table for one shard of a parameter."""
    from dfmspec.trainer.ops.kernels.optimizer import UPDATE_BLOCK

    if not adam.state[weight]:
        adam.initialize_state(weight, store_param_remainders=False)
    state = adam.state[weight]
    addresses = [tensor.data_ptr() for tensor in (weight, weight.grad, state["exp_avg"], state["exp_avg_sq"])]
    half = copy.data_ptr() if copy is not None else 0
    if any(address % 16 for address in (*addresses, half)):
        raise RuntimeError("a shard of megatron-core's buffers does not lie on 16 bytes")
    for start in range(0, weight.numel(), UPDATE_BLOCK):
        yield *(address + 4 * start for address in addresses), half + 2 * start, min(UPDATE_BLOCK, weight.numel() - start)
