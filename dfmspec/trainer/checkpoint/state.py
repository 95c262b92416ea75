"""A snapshot of a training, as megatron-core shards it: copied, written, and loaded into another layout.

It has model, averaged weights, optimizer and schedule of one instant; the optimizer's state is fully reshardable.
megatron-core's own ways are used but where they are slow or wrong for us, which each function says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica
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
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import save as torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dfmspec.errors import CheckpointError
from dfmspec.trainer.optim.update import single_optimizers
from dfmspec.trainer.setup import Trainer

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
    "chained_optim_avoid_prefix": True,
}
_WRITERS = 8
"""Files that a rank with a GPU writes at a time."""
_STATES = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer holds of each parameter, in fp32: the main weight and Adam's two moments."""
_FP32_BYTES = 16
"""Bytes a parameter beside the weight itself: its average, and each of _STATES."""
_ALIGNMENT = 64
"""Bytes to a multiple of which each tensor in host memory begins."""

# It would replace megatron-core's reader when Energon's dependency is installed.
MultiStorageClientFeature.disable()


class HostMemory:
    """Where snapshots are copied to, from save to save; pinned, so that a GPU writes to it at full speed."""

    def __init__(self, trainer: Trainer) -> None:
        size = 0
        for chunk in trainer.chunks:
            for weight in chunk.parameters():
                a_value = weight.element_size() + _FP32_BYTES
                size += weight.numel() * a_value
        self.on_gpu = trainer.experiment.cluster.device == "cuda"
        self._used = 0
        self._memory = torch.empty(
            size,
            dtype=torch.uint8,
            device="cpu",
            pin_memory=self.on_gpu,
        )

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this memory."""
        there = tensor.untyped_storage().data_ptr()
        here = self._memory.untyped_storage().data_ptr()
        return bool(there == here)

    def restart(self) -> None:
        """Begin again from the start: nothing that was handed out is needed any more."""
        self._used = 0

    def empty(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in this memory, or, where that is full, in memory of its own."""
        start = self._used
        size = math.prod(shape) * dtype.itemsize
        end = start + size
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        if self._used > len(self._memory):
            return torch.empty(shape, dtype=dtype, device="cpu")
        room = self._memory[start:end]
        return room.view(dtype).view(shape)


def _copy_to_host(sharded: ShardedStateDict, memory: HostMemory) -> None:
    """Let the tensors that this rank writes be copies in host memory; what `_whole_state` made there is one already."""
    for tensor in nested_values(sharded):
        if not isinstance(tensor, ShardedTensor):
            continue
        if not is_main_replica(tensor.replica_id):
            continue
        values = tensor.data
        if not memory.holds(values):
            host = memory.empty(values.shape, values.dtype)
            tensor.data = host.copy_(values.detach(), non_blocking=True)
    if memory.on_gpu:
        torch.cuda.current_stream().synchronize()


@torch.no_grad()
def _whole_state(
    optimizer: DistributedOptimizer,
    memory: HostMemory | None,
    *,
    empty_data: bool = False,
    **_: Any,
) -> dict[Any, Any]:
    """Weights and moments of every bucket, whole, in host memory: in place of get_parameter_state_dp_zero.

    megatron-core's own (core/optimizer/distrib_optimizer.py) goes several times through host memory on every rank, 20 s
    for DiT-XL. Here shards are put together on the GPU, bucket by bucket, and rank 0 of the data-parallel group, which
    writes them, copies each once. With `empty_data` there are no values: the tensors are about to be loaded.
    """
    group = optimizer.data_parallel_group
    writes = not empty_data and group.rank() == 0
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[index]
        ((dtype, ranges_of_buckets),) = ranges.items()
        whole = _empty_states(buffer.numel_unpadded, memory if writes else None)
        buckets = [] if empty_data else zip(buffer.buckets, ranges_of_buckets, strict=True)

        # Every rank gathers each bucket; the writing one copies it to its place.
        start = 0
        for bucket, ranges_of_bucket in buckets:
            end = start + bucket.numel_unpadded
            parameters = _parameters(optimizer, ranges_of_bucket)
            for name, together in _gather_bucket(bucket, parameters, group):
                if writes:
                    room = whole[name][start:end]
                    room.copy_(together, non_blocking=True)
            start = end
        state[index] = {dtype: whole | {"numel_unpadded": buffer.numel_unpadded}}
    return state


def _empty_states(size: int, memory: HostMemory | None) -> dict[str, Any]:
    """Uninitialised fp32 tensors [size], one for each of _STATES; in `memory` where it is given."""
    shape = (size,)
    if memory:
        return {name: memory.empty(shape, torch.float32) for name in _STATES}
    return {name: torch.empty(shape, dtype=torch.float32, device="cpu") for name in _STATES}


_States = dict[str, Tensor]
"""A tensor for each of _STATES."""


def _parameters(optimizer: DistributedOptimizer, ranges: dict[str, Any]) -> list[tuple[slice, _States]]:
    """For each parameter in a bucket: its place in this rank's shard of it, and the states of what lies there."""
    found = []
    for parameter, places in ranges["param_map"].items():
        local = places["gbuf_local"]
        here = slice(local.start, local.end)
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        found.append((here, states))
    return found


def _gather_bucket(
    bucket: Any,
    parameters: list[tuple[slice, _States]],
    group: dist.ProcessGroup,
) -> Iterator[tuple[str, Tensor]]:
    """The states of a bucket, each by its name, put together from the shards of all ranks, without padding."""
    # This rank's shard of each state.
    gradients = bucket.grad_data
    size = gradients.numel() // group.size()
    shards = {name: gradients.new_zeros(size, dtype=torch.float32) for name in _STATES}
    for here, states in parameters:
        for name, shard in shards.items():
            values = states[name].detach()
            shard[here].copy_(values.view(-1))

    # One state at a time, so that one alone takes memory for all ranks' shards.
    for name, shard in shards.items():
        yield name, torch.cat(_all_gathered(shard, group))[: bucket.numel_unpadded]


def _all_gathered(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The shards of all ranks, in their order."""
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
        """Take the snapshot.

        Args:
            trainer: what is trained.
            memory: where values are copied to, so that the training may go on; None: they are the trainer's own.
            check: look, with the other ranks, that every value is written by exactly one.
        """
        state = sharded_state(trainer, is_loading=False, memory=memory)
        state[_CONTENT_METADATA_KEY] = _METADATA
        sharded, self._common = save_preprocess(state, validate_access_integrity=check)
        if memory:
            _copy_to_host(sharded, memory)
            self._common = copy.deepcopy(self._common)
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self._shards = mcore_to_pyt_state_dict(renamed, False)
        self._threads = _WRITERS if trainer.experiment.cluster.device == "cuda" else 1

    def write(self, folder: Path, group: dist.ProcessGroup) -> None:
        """Write this rank's shards, fsynced, and on rank 0 what is common to all; `group` has every rank.

        Raises:
            CheckpointException: a rank could not write; every rank is told.
        """
        if dist.get_rank() == 0:
            torch.save(self._common, folder / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        files = FileSystemWriter(
            folder,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=self._threads,
        )
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=False,
            flatten_state_dict=False,
        )
        torch_save(
            self._shards,
            storage_writer=files,
            planner=planner,
            process_group=group,
        )


def sharded_state(trainer: Trainer, *, is_loading: bool, memory: HostMemory | None = None) -> ShardedStateDict:
    """Everything that megatron-core shards: model (by chunk of this rank), averaged weights, optimizer, schedule.

    Args:
        trainer: what is trained.
        is_loading: the tensors are about to be overwritten by those of a checkpoint.
        memory: where the optimizer's buckets are put together; None: in memory of their own.
    """
    for single in single_optimizers(trainer.optimizer):
        if isinstance(single, DistributedOptimizer):
            single.get_parameter_state_dp_zero = partial(_whole_state, single, memory)
    model: ShardedStateDict = {}
    for index, chunk in enumerate(trainer.chunks):
        metadata = dict(_METADATA)
        model[f"chunk{index}"] = chunk.sharded_state_dict(metadata=metadata)
    averages = trainer.ema.sharded_state_dict()
    optimizer = trainer.optimizer.sharded_state_dict(
        model,
        is_loading=is_loading,
        metadata=dict(_METADATA),
    )
    return {
        "model": model,
        "ema": averages,
        "optimizer": optimizer,
        "scheduler": trainer.scheduler.state_dict(),
    }


def load_tensors(wanted: ShardedStateDict, checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of a sharded state: its tensors, and plain values that are common to all ranks.

    Objects are not read: torch would unpickle them, and no weight is one. Those that are `wanted` (the extra state of
    linear layers, of which none is used) come back as None.

    Raises:
        CheckpointError: the checkpoint has an object where a tensor is wanted.
        KeyError, ValueError, CheckpointingException, CheckpointException: it has other tensors.
    """
    objects = list(_taken_objects(wanted))
    assert not any(isinstance(value, ShardedObject) for value in nested_values(wanted))
    kinds = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for tensor in nested_values(wanted):
        if isinstance(tensor, ShardedTensor) and isinstance(kinds.get(tensor.key), BytesStorageMetadata):
            raise CheckpointError(f"checkpoint {checkpoint} has an object for {tensor.key}, and no tensor")
    reader = TorchDistLoadShardedStrategy()
    found: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint), sharded_strategy=reader)
    for place in objects:
        inner = found
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = None
    return found


def _taken_objects(state: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Take the objects out of a sharded state; yields the keys that led to each."""
    for key in list(state):
        value = state[key]
        if isinstance(value, ShardedObject):
            del state[key]
            yield (*place, key)
        elif isinstance(value, dict):
            yield from _taken_objects(value, (*place, key))


_MISMATCHES = (KeyError, ValueError, CheckpointingException, CheckpointException)
"""What megatron-core and torch raise when a checkpoint has other tensors than are asked for."""


def load_state(trainer: Trainer, checkpoint: Path) -> None:
    """Restore the snapshot of a checkpoint into this layout.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    _allocate_moments(trainer.optimizer)
    try:
        state = load_tensors(sharded_state(trainer, is_loading=True), checkpoint)
    except _MISMATCHES as error:
        cause = _first_line(error)
        raise CheckpointError(f"checkpoint {checkpoint} is of another model: {cause}") from error
    model = state["model"]
    for index, chunk in enumerate(trainer.chunks):
        chunk.load_state_dict(model[f"chunk{index}"])
    _load_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])


def _first_line(error: Exception) -> str:
    """What went wrong, out of torch's account of all ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0]


_FROM_EXPERIMENT = ("max_lr", "min_lr", "betas", "eps")
"""What a group of parameters has from the experiment; an iteration's rate and weight decay come from the schedule."""


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """megatron-core's load_state_dict, but what the experiment says stays.

    It would take rates, betas and eps from the checkpoint. Mended too for torch's Adam (it is written for Apex's and
    Transformer Engine's): it forgets the step count among the loaded tensors, and then gives all parameters one shared
    step tensor, which torch counts up once for each of them.
    """
    # Before: what is to stay.
    singles = single_optimizers(optimizer)
    kept = [_from_experiment(single) for single in singles]
    for single in singles:
        if isinstance(single, DistributedOptimizer) and _counts_each_parameter(single):
            single._set_main_param_and_optimizer_states = partial(_set_with_step, single)
    optimizer.load_state_dict(state)

    # After: what stayed, and a step count for each parameter.
    for single, values_of_groups in zip(singles, kept, strict=True):
        for group, values in zip(single.optimizer.param_groups, values_of_groups, strict=True):
            group.update(values)
        _part_steps(single)


def _from_experiment(single: Any) -> list[dict[str, Any]]:
    """For each group of parameters, what the experiment says of it."""
    found = []
    for group in single.optimizer.param_groups:
        keys = [key for key in _FROM_EXPERIMENT if key in group]
        found.append({key: group[key] for key in keys})
    return found


def _counts_each_parameter(single: DistributedOptimizer) -> bool:
    """Whether the optimizer has a step count for each parameter, as torch's Adam has; others have one for a group."""
    first: dict[str, Any] = next(iter(single.optimizer.state.values()), {})
    return "step" in first


def _set_with_step(optimizer: DistributedOptimizer, model_param: Tensor, tensors: _States) -> None:
    """megatron-core's _set_main_param_and_optimizer_states, which asks for the step count too: it stays."""
    group, order = optimizer.model_param_group_index_map[model_param]
    weight = optimizer.optimizer.param_groups[group]["params"][order]
    step = optimizer.optimizer.state[weight]["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, model_param, {"step": step, **tensors})


def _part_steps(single: Any) -> None:
    """Give each parameter a step count of its own."""
    for values in single.optimizer.state.values():
        if isinstance(values.get("step"), Tensor):
            values["step"] = values["step"].clone()


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Let the optimizer have the state that is about to be overwritten: megatron-core asks its step count first."""
    for single in single_optimizers(optimizer):
        for group in single.optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        single.optimizer.step()
        single.optimizer.zero_grad()
