"""A snapshot of a training, as megatron-core shards it: copied, written, and loaded into another layout.

It has model, averaged weights, optimizer and schedule of one instant; the optimizer's state is fully reshardable. megatron-core's own ways are
used but where they are slow or wrong for us, which each function says.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter
from torch.distributed.checkpoint import save as torch_save

from dfmspec.errors import CheckpointError
from dfmspec.trainer.optim.update import single_optimizers
from dfmspec.trainer.setup import Trainer

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True, "chained_optim_avoid_prefix": True}

MultiStorageClientFeature.disable()  # it would replace megatron-core's reader when Energon's dependency is installed


_WRITERS = 8
"""Files that a rank with a GPU writes at a time."""


class HostMemory:
    """Where the state is copied to, from save to save; pinned, so that a GPU writes to it at full speed."""

    def __init__(self, trainer: Trainer) -> None:
        size = sum(weight.numel() * (weight.element_size() + 16) for chunk in trainer.chunks for weight in chunk.parameters())
        self.on_gpu = trainer.experiment.cluster.device == "cuda"
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.on_gpu)
        self._used = 0

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies there."""
        return tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()

    def restart(self) -> None:
        """Nothing is needed any more of what was handed out."""
        self._used = 0

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for one tensor."""
        start, size = self._used, math.prod(shape) * dtype.itemsize
        self._used = start + -(-size // 64) * 64
        if self._used > len(self._memory):
            return torch.empty(shape, dtype=dtype, device="cpu")
        return self._memory[start : start + size].view(dtype).view(shape)


def _copied(sharded: ShardedStateDict, memory: HostMemory) -> None:
    """Let the tensors that this rank writes be copies in host memory; what `_whole_state` made there is one already."""
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id) and not memory.holds(tensor.data):
            tensor.data = memory.empty(tensor.data.shape, tensor.data.dtype).copy_(tensor.data.detach(), non_blocking=True)
    if memory.on_gpu:
        torch.cuda.current_stream().synchronize()


@torch.no_grad()
def _whole_state(optimizer: DistributedOptimizer, memory: HostMemory | None, *, empty_data: bool = False, **_: Any) -> dict[Any, Any]:
    """megatron-core's get_parameter_state_dp_zero: weights and moments of every bucket, whole, in host memory.

    Its own goes several times through host memory on every rank, 20 s for DiT-XL. Here shards are put together on the
    GPU, bucket by bucket, and rank 0 of the data-parallel group, which writes them, copies each once.
    """
    group, names = optimizer.data_parallel_group, ("param", "exp_avg", "exp_avg_sq")
    writes, state = not empty_data and group.rank() == 0, {"buckets_coalesced": True}
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        ((dtype, buckets),), buffer, offset = ranges.items(), optimizer.buffers[index], 0
        make = memory.empty if memory and writes else partial(torch.empty, device="cpu")
        whole: dict[str, Any] = {name: make((buffer.numel_unpadded,), dtype=torch.float32) for name in names}
        for bucket, parameters in zip(buffer.buckets, [] if empty_data else buckets, strict=False):
            shards = {name: bucket.grad_data.new_zeros(bucket.grad_data.numel() // group.size(), dtype=torch.float32) for name in names}
            for parameter, places in parameters["param_map"].items():
                here, tensors = places["gbuf_local"], optimizer._get_main_param_and_optimizer_states(parameter)
                for name, shard in shards.items():
                    shard[here.start : here.end].copy_(tensors[name].detach().view(-1))
            for name, shard in shards.items():
                together = torch.cat(_all_gathered(shard, group))[: bucket.numel_unpadded]
                if writes:
                    whole[name][offset : offset + bucket.numel_unpadded].copy_(together, non_blocking=True)
            offset += bucket.numel_unpadded
        state[index] = {dtype: whole | {"numel_unpadded": buffer.numel_unpadded}}
    return state


def _all_gathered(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    return shards


class Snapshot:
    """What this rank writes of one instant of the training.

    megatron-core's own save starts writer processes, and waits for ever when one rank's disk is full; torch's writer in
    this process is as fast as the disk, and tells the others.
    """

    def __init__(self, trainer: Trainer, memory: HostMemory | None, *, check: bool) -> None:
        """`memory`: what is held are copies there, and the training may go on. `check`, with the other ranks, that every value is written by exactly one."""
        state = sharded_state(trainer, is_loading=False, memory=memory) | {_CONTENT_METADATA_KEY: _METADATA}
        sharded, self._common = save_preprocess(state, validate_access_integrity=check)
        if memory:
            _copied(sharded, memory)
            self._common = copy.deepcopy(self._common)
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self._shards = mcore_to_pyt_state_dict(renamed, False)
        self._threads = _WRITERS if trainer.experiment.cluster.device == "cuda" else 1

    def write(self, folder: Path, group: dist.ProcessGroup) -> None:
        """The shards of every rank, fsynced, and what is common to all."""
        if dist.get_rank() == 0:
            torch.save(self._common, folder / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        torch_save(
            self._shards,
            storage_writer=FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=self._threads),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=group,
        )


def sharded_state(trainer: Trainer, *, is_loading: bool, memory: HostMemory | None = None) -> ShardedStateDict:
    """Everything that megatron-core shards: model (by chunk of this rank), averaged weights, optimizer, schedule."""
    for single in single_optimizers(trainer.optimizer):
        if isinstance(single, DistributedOptimizer):
            single.get_parameter_state_dp_zero = partial(_whole_state, single, memory)
    model: ShardedStateDict = {
        f"chunk{index}": chunk.sharded_state_dict(metadata=dict(_METADATA)) for index, chunk in enumerate(trainer.chunks)
    }
    return {
        "model": model,
        "ema": trainer.ema.sharded_state_dict(),
        "optimizer": trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA)),
        "scheduler": trainer.scheduler.state_dict(),
    }


def load_state(trainer: Trainer, checkpoint: Path) -> None:
    """Restore all of it into this layout.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    _allocate_moments(trainer.optimizer)
    try:
        state = dist_checkpointing.load(
            sharded_state(trainer, is_loading=True), str(checkpoint), sharded_strategy=TorchDistLoadShardedStrategy()
        )
    except (KeyError, ValueError, dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(f"checkpoint {checkpoint} is of another model: {str(cause).strip().splitlines()[0]}") from error
    for index, chunk in enumerate(trainer.chunks):
        chunk.load_state_dict(state["model"][f"chunk{index}"])
    _load_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])


_SAID = ("max_lr", "min_lr", "betas", "eps")
"""What a group of parameters has from the experiment; rate and weight decay of an iteration follow from the schedule."""


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """megatron-core's load_state_dict, but what the experiment says stays: it would take rates, betas and eps from the checkpoint.

    Mended too for torch's Adam (it is written for Apex's and Transformer Engine's): it forgets the step count among the
    loaded tensors, and then gives all parameters one shared step tensor, which torch counts up once for each of them.
    """
    said = [[{key: group[key] for key in _SAID if key in group} for group in single.optimizer.param_groups] for single in single_optimizers(optimizer)]
    for single in single_optimizers(optimizer):
        if isinstance(single, DistributedOptimizer) and "step" in next(iter(single.optimizer.state.values()), {}):
            single._set_main_param_and_optimizer_states = partial(_set_with_step, single)
    optimizer.load_state_dict(state)
    for single, values_said in zip(single_optimizers(optimizer), said, strict=True):
        for group, value_said in zip(single.optimizer.param_groups, values_said, strict=True):
            group.update(value_said)
    for single in single_optimizers(optimizer):
        for values in single.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()


def _set_with_step(optimizer: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, order = optimizer.model_param_group_index_map[model_param]
    own = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
    DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, model_param, {"step": own["step"], **tensors})


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Let the optimizer have the state that is about to be overwritten: megatron-core asks its step count first."""
    for single in single_optimizers(optimizer):
        for group in single.optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        single.optimizer.step()
        single.optimizer.zero_grad()
