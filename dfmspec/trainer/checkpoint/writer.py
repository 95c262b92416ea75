"""Committed checkpoints: a checkpoint is whole, or it does not exist.

A snapshot of the training (model, averaged weights, optimizer, schedule, streams) goes into `iter_N.tmp-<uuid>/`; each
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint import CheckpointException

from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import MANIFEST, TRACKER, committed, crc32s, iteration_of, problem
from dfmspec.trainer.checkpoint.state import HostMemory, Snapshot, load_state
from dfmspec.trainer.data.streams import RankStreams, load_states, save_states
from dfmspec.trainer.setup import Trainer, patience

_FORMAT_VERSION = 1


class Writer:
    """Writes a run's checkpoints, one at a time; with `checkpoint.async_save` while the training goes on from copies in host memory."""

    def __init__(self, trainer: Trainer, folder: Path, config: dict[str, Any], digest: str) -> None:
        self._trainer, self._folder, self._config, self._digest = trainer, folder, config, digest
        # What the thread says to other ranks must not meet the training's collectives.
        self._group = dist.new_group(backend="gloo", timeout=patience(trainer.experiment))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._checked = False
        """Who writes what has been looked at, and stays as it is."""
        beside, on_gpu = trainer.experiment.checkpoint.async_save, trainer.experiment.cluster.device == "cuda"
        writes = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0  # the others hold copies of the same
        self._memory = self._thread.submit(HostMemory, trainer) if writes and (beside or on_gpu) else None  # pinning it takes seconds

    def save(self, streams: dict[int, Any], iteration: int) -> Future[Path]:
        """Commit a snapshot of the training after `iteration`, streams included; a checkpoint of that iteration that is there already is left alone.

        The state may change as soon as this returns with `async_save`, and else when the future is done. Its exception is
        an OSError: the disk; the aside folder is removed and nothing earlier is touched.
        """
        final, first = self._folder / f"iter_{iteration:07d}", dist.get_rank() == 0
        names = [""]
        try:
            self._together(lambda: names.__setitem__(0, _aside_name(final)) if first else None)
            dist.broadcast_object_list(names, src=0, group=self._group)
            if not names[0]:
                return self._thread.submit(lambda: final)
            aside = self._folder / names[0]
            self._together(lambda: aside.mkdir(parents=True) if first else None)
            memory = self._memory.result() if self._memory else None
            if memory:
                memory.restart()
            snapshot, self._checked = Snapshot(self._trainer, memory, check=not self._checked), True
        except OSError as error:
            failed: Future[Path] = Future()
            failed.set_exception(self._abandoned(self._folder / names[0], error) if names[0] else error)
            return failed
        return self._thread.submit(self._write, snapshot, streams, aside, final, iteration)

    def _write(self, snapshot: Snapshot, streams: dict[int, Any], aside: Path, final: Path, iteration: int) -> Path:
        facts: dict[str, Any] = {}

        def write() -> None:
            snapshot.write(aside, self._group)
            mine = list(aside.glob(f"__{dist.get_rank()}_*.distcp"))
            mine.extend(save_states(aside / "streams", streams) if _owns_streams() else ())
            if dist.get_rank() == 0:
                mine.extend(aside / name for name in _SHARED if (aside / name).exists())
            for path in mine:
                _fsync(path)
            for path, crc in zip(mine, crc32s(mine), strict=True):
                facts[path.relative_to(aside).as_posix()] = {"size": path.stat().st_size, "crc32": crc}

        def commit() -> None:
            _commit(aside, final, iteration, {name: fact for of_rank in files for name, fact in of_rank.items()}, self._config, self._digest)

        try:
            self._together(write)
            files: list[dict[str, Any]] = [{}] * dist.get_world_size()
            dist.all_gather_object(files, facts, group=self._group)
            self._together(lambda: commit() if dist.get_rank() == 0 else None)
        except OSError as error:
            raise self._abandoned(aside, error) from error
        if dist.get_rank() == 0:
            with suppress(OSError):  # what could not be removed is tried again after the next save
                _prune(self._folder, self._trainer.experiment.checkpoint.most_recent_k, iteration)
        return final

    def _abandoned(self, aside: Path, error: OSError) -> OSError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        return error

    def _together(self, action: Callable[[], Any]) -> None:
        """Do something on every rank; when it fails on any, an OSError on all, so that none waits for another."""
        error: BaseException | None = None
        try:
            action()
        except (OSError, RuntimeError, CheckpointException) as caught:  # torch.save has RuntimeErrors for a full disk
            error = caught
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, _first_line(error) if error else None, group=self._group)
        if any(failures):
            raise OSError(next(failure for failure in failures if failure))


_SHARED = (".metadata", "common.pt", "metadata.json")
"""What rank 0 writes for all."""


def _aside_name(final: Path) -> str:
    """Where a checkpoint is written before it has its name; "" when a whole one of that name is there already."""
    if final.exists():
        if problem(final) is None:
            return ""
        os.rename(final, final.with_name(f"{final.name}.damaged-{uuid.uuid4().hex[:8]}"))
    return f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"


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


def _commit(aside: Path, final: Path, iteration: int, files: dict[str, Any], config: dict[str, Any], digest: str) -> None:
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


def _prune(folder: Path, keep: int, iteration: int) -> None:
    """Remove the oldest checkpoints beyond `keep` (at least 2; -1: keep all), and what killed saves left aside.

    Those after `iteration`, the one just saved, are damaged, or the run would have begun there: they count for nothing, and stay.

    A checkpoint is first renamed aside: a kill in the middle of its removal leaves no half of one under its name.
    """
    behind = [path for path in committed(folder) if iteration_of(path) <= iteration]
    for path in behind[max(keep, 2) :] if keep != -1 else ():
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


_NETWORK = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "num_query_groups", "crossattn_emb_size", "in_channels",
    "patch_spatial", "patch_temporal", "max_frames", "max_img_h", "max_img_w", "adaln_lora_rank",
)  # fmt: skip
"""The keys of `model` that shape its parameters."""


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
    theirs, mine = stored["model"], ours.model.model_dump()
    if other := [key for key in _NETWORK if theirs.get(key, mine[key]) != mine[key]]:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another network: {', '.join(f'model.{key} is {theirs[key]}, not {mine[key]}' for key in other)}; "
            "give its values, or a checkpoint.save of its own to this network"
        )
    load_state(trainer, checkpoint)
    load_states(checkpoint / "streams", list(streams.streams.values()))


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
