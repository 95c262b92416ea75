"""Committed checkpoints: a checkpoint is whole, or it does not exist.

Everything of one moment (model, averaged weights, optimizer, schedule, streams) goes into `iter_N.tmp-<uuid>/`; each
rank's files are fsynced, `manifest.json` lists every file with size and checksum, and only then the folder is renamed
to `iter_N` and the tracker replaced, each followed by an fsync of the parent. Nothing is ever written into an existing
checkpoint. Loading takes the newest whole one and says what it passed over; folders without a whole checkpoint are an
error, never a fresh start. The shards are megatron-core's torch_dist, so they can be read in another layout.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
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

from dfmspec.checkpoints import MANIFEST, TRACKER, committed, crc32, iteration_of, problem
from dfmspec.errors import CheckpointError
from dfmspec.trainer.setup import Trainer
from dfmspec.trainer.streams import RankStreams, load_states, save_states

_FORMAT_VERSION = 1
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True, "chained_optim_avoid_prefix": True}

MultiStorageClientFeature.disable()  # it would replace megatron-core's reader when Energon's dependency is installed


class _SyncStrategy(SaveShardedStrategy):
    """torch_dist shards, written and fsynced in this process.

    megatron-core's own strategy starts writer processes for every save; this one is as fast as the disk.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def can_handle_sharded_objects(self) -> bool:
        return True

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def sharded_state(trainer: Trainer, *, is_loading: bool) -> ShardedStateDict:
    """Everything that megatron-core shards: model (by chunk of this rank), averaged weights, optimizer, schedule."""
    model: ShardedStateDict = {
        f"chunk{index}": chunk.sharded_state_dict(metadata=_METADATA) for index, chunk in enumerate(trainer.chunks)
    }
    return {
        "model": model,
        "ema": trainer.ema.sharded_state_dict(),
        "optimizer": trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_METADATA),
        "scheduler": trainer.scheduler.state_dict(),
    }


def save(
    trainer: Trainer, streams: dict[int, Any], folder: Path, iteration: int, config: dict[str, Any], digest: str
) -> Path:  # fmt: skip
    """Commit the whole state after `iteration`, streams included; a checkpoint of that iteration that is there already is left alone.

    Raises:
        OSError: the disk; the aside folder is removed and nothing earlier is touched.
    """
    final, first = folder / f"iter_{iteration:07d}", dist.get_rank() == 0
    names = [""]
    _together(lambda: names.__setitem__(0, _aside_name(final)) if first else None)
    dist.broadcast_object_list(names, src=0)
    if not names[0]:
        return final
    aside = folder / names[0]

    def write() -> None:
        dist_checkpointing.save(
            sharded_state(trainer, is_loading=False), str(aside), sharded_strategy=_SyncStrategy(), content_metadata=_METADATA
        )
        for path in save_states(aside / "streams", streams) if _owns_streams() else ():
            _fsync(path)

    try:
        _together(lambda: aside.mkdir(parents=True) if first else None)
        _together(write)
        _together(lambda: _commit(aside, final, iteration, config, digest) if first else None)
    except OSError:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if first:
        with suppress(OSError):  # what could not be removed is tried again after the next save
            _prune(folder, trainer.experiment.checkpoint.most_recent_k)
    return final


def _aside_name(final: Path) -> str:
    """Where a checkpoint is written before it has its name; "" when a whole one of that name is there already."""
    if final.exists():
        if problem(final) is None:
            return ""
        os.rename(final, final.with_name(f"{final.name}.damaged-{uuid.uuid4().hex[:8]}"))
    return f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"


def _together(action: Callable[[], Any]) -> None:
    """Do something on every rank; when it fails on any, an OSError on all, so that none waits for another."""
    error: BaseException | None = None
    try:
        action()
    except (OSError, RuntimeError, CheckpointException) as caught:  # torch.save has RuntimeErrors for a full disk
        error = caught
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, _first_line(error) if error else None)
    if any(failures):
        raise OSError(next(failure for failure in failures if failure))


def _first_line(error: BaseException) -> str:
    """What went wrong on the disk, out of torch's account of all ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:  # torch's writer hides the system's word
        return f"a file could not be written whole (is the disk full?): {str(error).strip().splitlines()[0]}"
    return str(cause)


def _owns_streams() -> bool:
    """One rank of each data-parallel group writes its streams; its model-parallel peers read the same ones."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def _commit(aside: Path, final: Path, iteration: int, config: dict[str, Any], digest: str) -> None:
    files = {}
    for path in sorted(path for path in aside.rglob("*") if path.is_file()):
        _fsync(path)
        files[path.relative_to(aside).as_posix()] = {"size": path.stat().st_size, "crc32": crc32(path)}
    manifest = {
        "format_version": _FORMAT_VERSION, "iteration": iteration, "config_digest": digest, "config": config, "files": files,
    }  # fmt: skip
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for path in (aside / MANIFEST, *(path for path in aside.rglob("*") if path.is_dir()), aside):
        _fsync(path)
    os.rename(aside, final)
    _fsync(final.parent)
    tracker = final.parent / f"{TRACKER}.tmp"
    tracker.write_text(f"{iteration}\n")
    _fsync(tracker)
    os.replace(tracker, final.parent / TRACKER)
    _fsync(final.parent)


def _prune(folder: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep` (at least 2; -1: keep all), and what killed saves left aside.

    A checkpoint is first renamed aside: a kill in the middle of its removal leaves no half of one under its name.
    """
    for path in committed(folder)[max(keep, 2) :] if keep != -1 else ():
        os.rename(path, path.with_name(f"{path.name}.tmp-old-{uuid.uuid4().hex[:8]}"))
    _fsync(folder)
    for left in folder.glob("iter_*.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def find(folder: Path, *, iteration: int | None, report: Callable[[str], None]) -> Path | None:
    """The checkpoint to load: the newest whole one, or that of `iteration`; None when there is nothing to resume from.

    Raises:
        CheckpointError: `iteration` is not there or not whole; or checkpoints exist and none is whole.
    """
    if iteration is not None:
        path = folder / f"iter_{iteration:07d}"
        have = ", ".join(str(iteration_of(found)) for found in committed(folder)) or "none"
        if not path.exists():
            raise CheckpointError(f"{folder} has no checkpoint of iteration {iteration}; it has: {have}")
        if fault := problem(path):
            raise CheckpointError(f"checkpoint {path} is not whole: {fault}. Committed iterations: {have}")
        return path
    candidates = sorted((path for path in folder.glob("iter_*") if path.name[5:].isdigit()), reverse=True)
    for path in candidates:
        fault = problem(path)
        if fault is None:
            return path
        report(f"[WARNING] Checkpoint {path} is passed over: {fault}")
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is whole; to start afresh, move them away or set run.resume=never"
        )
    return None


def load(trainer: Trainer, streams: RankStreams, checkpoint: Path) -> None:
    """Restore everything that `save` wrote, into this layout.

    Raises:
        CheckpointError: the checkpoint is of another model, or of another number of streams.
    """
    stored = stored_config(checkpoint)
    ours = trainer.experiment
    if stored["data"]["num_streams"] != ours.data.num_streams:
        raise CheckpointError(
            f"checkpoint {checkpoint} has {stored['data']['num_streams']} streams and this run {ours.data.num_streams}; "
            f"give data.num_streams={stored['data']['num_streams']} to continue its data exactly"
        )
    _allocate_moments(trainer.optimizer)
    try:
        state = dist_checkpointing.load(
            sharded_state(trainer, is_loading=True), str(checkpoint), sharded_strategy=TorchDistLoadShardedStrategy()
        )
    except (KeyError, ValueError, dist_checkpointing.core.CheckpointingException) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"checkpoint {checkpoint} is of another model: {first}") from error
    for index, chunk in enumerate(trainer.chunks):
        chunk.load_state_dict(state["model"][f"chunk{index}"])
    _load_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    load_states(checkpoint / "streams", list(streams.streams.values()))


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """megatron-core's load_state_dict, mended for torch's Adam (it is written for Apex's and Transformer Engine's).

    It forgets the step count among the loaded tensors, and then gives all parameters one shared step tensor, which
    torch counts up once for each of them.
    """
    for single in _single_optimizers(optimizer):
        if isinstance(single, DistributedOptimizer) and "step" in next(iter(single.optimizer.state.values()), {}):
            single._set_main_param_and_optimizer_states = partial(_set_with_step, single)
    optimizer.load_state_dict(state)
    for single in _single_optimizers(optimizer):
        for values in single.optimizer.state.values():
            if isinstance(values.get("step"), torch.Tensor):
                values["step"] = values["step"].clone()


def _set_with_step(optimizer: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, order = optimizer.model_param_group_index_map[model_param]
    own = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
    DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, model_param, {"step": own["step"], **tensors})


def _single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Let the optimizer have the state that is about to be overwritten: megatron-core asks its step count first."""
    for single in _single_optimizers(optimizer):
        for group in single.optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        single.optimizer.step()
        single.optimizer.zero_grad()


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """The configuration of the run that wrote a checkpoint."""
    config: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["config"]
    return config


def stored_iteration(checkpoint: Path) -> int:
    """The iteration after which a checkpoint was written."""
    iteration: int = json.loads((checkpoint / MANIFEST).read_text())["iteration"]
    return iteration


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
