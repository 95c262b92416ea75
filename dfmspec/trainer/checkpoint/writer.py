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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint import CheckpointException

from dfmspec.errors import CheckpointError
from dfmspec.files import write_aside
from dfmspec.record.checkpoints import (
    FORMAT_VERSION,
    SHARED,
    TRACKER,
    committed,
    crc32s,
    iteration_of,
    problem,
    read_manifest,
)
from dfmspec.record.progress import Identity
from dfmspec.spec.checkpoints import MANIFEST
from dfmspec.spec.iterations import LEFT_ASIDE, folder_of
from dfmspec.spec.network import NETWORK
from dfmspec.trainer.checkpoint.state import HostMemory, Snapshot, load_state
from dfmspec.trainer.data.streams import RankStreams, States, load_states, save_states
from dfmspec.trainer.setup import Trainer, patience

Result = TypeVar("Result")
Files = dict[str, dict[str, Any]]
"""Size and CRC-32 of each file of a checkpoint, by its name."""


class Writer:
    """Writes a run's checkpoints, one at a time.

    With `checkpoint.async_save` it does so while the training goes on, from copies in host memory.
    """

    def __init__(self, trainer: Trainer, folder: Path, identity: Identity) -> None:
        """`identity` stands in the manifest of each checkpoint in `folder`."""
        self._trainer = trainer
        self._folder = folder
        self._identity = identity
        # What the thread says to other ranks must not meet the training's collectives.
        self._group = dist.new_group(backend="gloo", timeout=patience(trainer.experiment))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._checked = False
        """Who writes what has been looked at, and stays as it is."""

        # The other ranks of a data-parallel group hold copies of what its first one writes.
        writes = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        on_gpu = trainer.experiment.cluster.device == "cuda"
        self._memory: Future[HostMemory] | None = None
        if writes and (on_gpu or trainer.experiment.checkpoint.async_save):
            self._memory = self._thread.submit(HostMemory, trainer)  # pinning it takes seconds

    def save(self, streams: States, iteration: int) -> Future[Path]:
        """Commit a snapshot of the training after `iteration`, with the state of each of `streams`.

        A whole checkpoint of that iteration that is there already is left alone. The training may go on as soon as this
        returns with `async_save`, and else when the future is done. The future's exception is an OSError, when the disk
        is at fault: the folder that was being written is then removed, and nothing earlier is touched.
        """
        final = self._folder / folder_of(iteration)
        aside: Path | None = None
        try:
            name = self._agreed_name(final)
            if not name:
                return self._thread.submit(lambda: final)
            aside = self._folder / name
            self._on_rank_0(partial(aside.mkdir, parents=True))
            snapshot = self._snapshot()
        except OSError as error:
            self._abandon(aside)
            failed: Future[Path] = Future()
            failed.set_exception(error)
            return failed
        return self._thread.submit(self._write, snapshot, streams, aside, final, iteration)

    def _agreed_name(self, final: Path) -> str:
        """The folder to write aside of `final`, as rank 0 names it; "" when a whole checkpoint is there already."""
        names: list[Any] = [self._on_rank_0(partial(_aside_name, final))]
        dist.broadcast_object_list(names, src=0, group=self._group)
        name: str = names[0]
        return name

    def _snapshot(self) -> Snapshot:
        """This rank's part of a snapshot; who writes what is looked at once."""
        memory = None
        if self._memory:
            memory = self._memory.result()
            memory.restart()
        snapshot = Snapshot(self._trainer, memory, check=not self._checked)
        self._checked = True
        return snapshot

    def _write(self, snapshot: Snapshot, streams: States, aside: Path, final: Path, iteration: int) -> Path:
        """Write the files of every rank into `aside`, and commit them as `final`."""
        try:
            # Every rank writes its files, and learns those of the others.
            mine = self._together(partial(self._write_files, snapshot, streams, aside))
            of_ranks: list[Files] = [{}] * dist.get_world_size()
            dist.all_gather_object(of_ranks, mine, group=self._group)
            files: Files = {}
            for of_rank in of_ranks:
                files |= of_rank

            # Rank 0 commits them all.
            manifest = {
                "format_version": FORMAT_VERSION,
                "iteration": iteration,
                "plan_id": self._identity.plan_id,
                "run_id": self._identity.run_id,
                "config_digest": self._identity.config_digest,
                "config": self._identity.config,
                "files": files,
            }
            self._on_rank_0(partial(_commit, aside, final, manifest))
        except OSError:
            self._abandon(aside)
            raise
        if dist.get_rank() == 0:
            with suppress(OSError):  # what could not be removed is tried again after the next save
                _prune(self._folder, self._trainer.experiment.checkpoint.most_recent_k, iteration)
        return final

    def _write_files(self, snapshot: Snapshot, streams: States, aside: Path) -> Files:
        """Write this rank's files, on the disk when this returns; their sizes and checksums, by name."""
        # Write.
        snapshot.write(aside, self._group)
        rank = dist.get_rank()
        mine = list(aside.glob(f"__{rank}_*.distcp"))
        if _owns_streams():
            mine += save_states(aside, streams)
        if rank == 0:
            shared = [aside / name for name in SHARED]
            mine += [path for path in shared if path.exists()]
        for path in mine:
            _fsync(path)

        # Read back.
        files: Files = {}
        for path, crc in zip(mine, crc32s(mine), strict=True):
            name = path.relative_to(aside).as_posix()
            files[name] = {"size": path.stat().st_size, "crc32": crc}
        return files

    def _abandon(self, aside: Path | None) -> None:
        """Remove what was written of a checkpoint that fails."""
        if aside is not None and dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)

    def _on_rank_0(self, action: Callable[[], Result]) -> Result | None:
        """Do something on rank 0, and None elsewhere; when it fails, an OSError on every rank."""
        if dist.get_rank() == 0:
            return self._together(action)
        return self._together(_nothing)

    def _together(self, action: Callable[[], Result]) -> Result:
        """Do something on every rank; when it fails on any, an OSError on all, so that none waits for another."""
        error: BaseException | None = None
        try:
            result = action()
        except (OSError, RuntimeError, CheckpointException) as caught:  # torch.save has RuntimeErrors for a full disk
            error = caught
        failure = _first_line(error) if error else None
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure, group=self._group)
        failed = [each for each in failures if each is not None]
        if failed:
            raise OSError(failed[0])
        return result


def _nothing() -> None:
    """What the other ranks do while rank 0 acts."""


def _aside_name(final: Path) -> str:
    """Where a checkpoint is written before it has its name; "" when a whole one of that name is there already."""
    if final.exists():
        if problem(final) is None:
            return ""
        damaged = final.with_name(f"{final.name}.damaged-{_unique()}")
        os.rename(final, damaged)
    return f"{final.name}.tmp-{_unique()}"


def _unique() -> str:
    """Eight hexadecimal digits that no other folder has."""
    return uuid.uuid4().hex[:8]


def _first_line(error: BaseException) -> str:
    """What went wrong on the disk, out of torch's account of all ranks."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        return str(cause)
    # Torch's writer hides the system's word.
    line = str(error).strip().splitlines()[0]
    return f"a file could not be written whole (is the disk full?): {line}"


def _owns_streams() -> bool:
    """One rank of each data-parallel group writes its streams; its model-parallel peers read the same ones."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def _commit(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Give a folder whose files are all on the disk its manifest, its name and the tracker."""
    # The manifest, and every name in the folder.
    text = json.dumps(manifest, indent=1, sort_keys=True)
    (aside / MANIFEST).write_text(f"{text}\n")
    _fsync(aside / MANIFEST)
    for path in aside.rglob("*"):
        if path.is_dir():
            _fsync(path)
    _fsync(aside)

    # From here on it is a checkpoint.
    os.rename(aside, final)
    _fsync(final.parent)

    # The tracker, in the same way.
    iteration = manifest["iteration"]
    write_aside(final.parent / TRACKER, f"{iteration}\n")
    _fsync(final.parent)


def _prune(folder: Path, keep: int, iteration: int) -> None:
    """Remove the oldest checkpoints beyond `keep` (at least 2; -1: keep all), and what killed saves left aside.

    Those after `iteration`, the one just saved, are damaged, or the run would have begun there: they count for nothing,
    and stay. A checkpoint is first renamed aside: a kill in the middle of its removal leaves no half of one under its
    name.
    """
    behind = [path for path in committed(folder) if iteration_of(path) <= iteration]
    surplus = [] if keep == -1 else behind[max(keep, 2) :]
    for path in surplus:
        old = path.with_name(f"{path.name}.tmp-old-{_unique()}")
        os.rename(path, old)
    _fsync(folder)
    for left in folder.glob(LEFT_ASIDE):
        shutil.rmtree(left, ignore_errors=True)


def load(trainer: Trainer, streams: RankStreams, checkpoint: Path) -> None:
    """Restore a checkpoint that `Writer.save` wrote, into this layout: the training and the state of its streams.

    Raises:
        CheckpointError: the checkpoint is of another network, or of another number of streams.
    """
    stored = read_manifest(checkpoint)["config"]
    ours = trainer.experiment
    _check_streams(checkpoint, stored["data"]["num_streams"], ours.data.num_streams)
    _check_network(checkpoint, stored["model"], ours.model.model_dump())
    load_state(trainer, checkpoint)
    load_states(checkpoint, list(streams.streams.values()))


def _check_streams(checkpoint: Path, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise CheckpointError(
            f"checkpoint {checkpoint} has {theirs} streams and this run {ours}; "
            f"give data.num_streams={theirs} to continue its data exactly"
        )


def _check_network(checkpoint: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    other = [key for key in NETWORK if theirs.get(key, ours[key]) != ours[key]]
    if other:
        differences = ", ".join(f"model.{key} is {theirs[key]}, not {ours[key]}" for key in other)
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another network: {differences}; "
            "give its values, or a checkpoint.save of its own to this network"
        )


def _fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
