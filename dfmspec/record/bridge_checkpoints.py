"""Checkpoints as Megatron-Bridge writes them, by their files, without torch: which there are, which is gone on from,
and whether one is whole as far as files tell.

A save writes shards (`*.distcp`), what describes them (`.metadata`), what all ranks share (`common.pt`), and in the end
the state of the training (`train_state.pt`), which it copies beside the checkpoints: from there it is gone on. There
are no checksums.

Source: megatron/bridge/training/checkpointing.py at the revision that NVIDIA DFM pins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dfmspec.bounded import read_bytes
from dfmspec.data.pickles import (
    ANY_NAME,
    BRIDGE_METADATA_NAMES,
    LARGEST,
    TRAIN_STATE_NAMES,
    Kept,
    contents,
    integer_in,
)
from dfmspec.errors import CheckpointError, DataError
from dfmspec.files import write_aside
from dfmspec.record.checkpoints import COMMON, METADATA, iteration_of
from dfmspec.record.files import read_json
from dfmspec.record.progress import Progress, tracked_in
from dfmspec.spec.checkpoints import is_committed, of_another
from dfmspec.spec.digest import bytes_digest
from dfmspec.spec.iterations import folder_of, iteration_folders

TRAIN_STATE = "train_state.pt"
LATEST_TRAIN_STATE = "latest_train_state.pt"
OWNER_OF_FOLDER = ".dfmspec-plan.json"
"""In a folder of checkpoints: the plan that saves there."""
WHOLENESS = "whole as far as its files tell: they carry no checksums"
"""What can be said of a checkpoint that has no fault."""


class _Stored(NamedTuple):
    """Where a part of a tensor lies."""

    file: str
    end: int
    """The byte after it."""


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a folder whose save was finished, the highest iteration first."""
    return [path for path in iteration_folders(folder) if is_committed(path, own=False)]


def tracked(folder: Path) -> int:
    """The iteration that upstream goes on from; 0: it would begin anew.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    state = folder / LATEST_TRAIN_STATE
    if not state.exists():
        return tracked_in(folder)
    try:
        step = _step_in(state)
    except DataError as error:
        raise CheckpointError(
            f"{state} is damaged: {error}; copy {TRAIN_STATE} of the checkpoint to go on from in its place"
        ) from error
    return step


def check_start(progress: Progress, plan_id: str, starts_from: Mapping[str, Any]) -> None:
    """See that upstream goes on where a run was, and with what is its own, at which it does not look itself.

    Args:
        progress: what the run has committed.
        plan_id: of the run.
        starts_from: the keys of section `checkpoint` by which it starts elsewhere, until it has committed anything.

    Raises:
        CheckpointError: it would begin anew, or before what was committed, or from what is not whole or another plan's.
    """
    folder = progress.save
    asked = None
    if starts_from and progress.iteration == 0:
        folder = Path(starts_from["load"])
        asked = starts_from.get("ckpt_step")
        if asked is None and tracked(folder) == 0:
            raise CheckpointError(f"{folder} has no checkpoint to resume from: no {LATEST_TRAIN_STATE} in it")
    elif not progress.is_named:
        _check_owner(folder, plan_id)
    at = tracked(folder) if asked is None else asked
    if folder != progress.save:
        progress = progress._replace(iteration=0)
    if at < progress.iteration:
        raise CheckpointError(
            f"the script would go on from iteration {at} by the files in {folder}, but iteration "
            f"{progress.iteration} was committed, says {progress.witness}; put the checkpoints back, or {progress.anew}"
        )
    if at == 0:
        return
    path = folder / folder_of(at)
    fault = problem(path) if path.exists() else "it is gone"
    if fault is None:
        return
    others = [iteration_of(found) for found in committed(folder) if iteration_of(found) != at]
    way_out = f"go on from another with run.resume={others[0]}" if others else progress.anew
    raise CheckpointError(f"the script would go on from {path}, which cannot be used: {fault}; {way_out}")


def own_folder(folder: Path, plan_id: str) -> None:
    """Write down in a folder of checkpoints which plan saves there: upstream's checkpoints do not say."""
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / OWNER_OF_FOLDER, json.dumps({"plan_id": plan_id}) + "\n")


def _check_owner(folder: Path, plan_id: str) -> None:
    """See that the checkpoints of a folder are a plan's own.

    Raises:
        CheckpointError: they are another's.
    """
    if not committed(folder):
        return
    try:
        theirs = read_json(folder / OWNER_OF_FOLDER).get("plan_id")
    except (OSError, ValueError):
        theirs = None
    if theirs == plan_id:
        return
    whose = "of nobody knows which plan" if theirs is None else "of another plan"
    raise CheckpointError(
        f"the checkpoints in {folder} are {whose}, and the script would go on from them; give checkpoint.save a folder "
        f"of its own, or go on from them with run.resume={folder}"
    )


def manifest_digest(checkpoint: Path) -> str:
    """sha256 of what describes a checkpoint's shards.

    Raises:
        OSError: it cannot be read.
    """
    return bytes_digest(read_bytes(checkpoint / METADATA, most=LARGEST))


def problem(checkpoint: Path, digests: object = None) -> str | None:
    """Why a checkpoint cannot be used; None: nothing that its files tell.

    Args:
        checkpoint: its folder.
        digests: nothing; a checkpoint of upstream's may be saved again.
    """
    whose = of_another(checkpoint, own=False)
    if whose is not None:
        return f"it is {whose}"
    try:
        _check_shards(checkpoint)
        _check_iteration(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def _check_shards(checkpoint: Path) -> None:
    """See that every part of every tensor has its bytes.

    Raises:
        CheckpointError: what describes them is missing or not trusted, or a file is missing or cut.
    """
    metadata = _loaded(checkpoint / METADATA, BRIDGE_METADATA_NAMES, is_zip=False)
    state = metadata.state if isinstance(metadata, Kept) else None
    storage = state.get("storage_data") if isinstance(state, dict) else None
    if not isinstance(storage, dict) or not storage:
        raise CheckpointError(f"its {METADATA} does not say where the tensors are")

    # The longest that each file must be.
    ends: dict[str, int] = {}
    for stored in _stored(storage):
        ends[stored.file] = max(stored.end, ends.get(stored.file, 0))
    for name, end in sorted(ends.items()):
        path = checkpoint / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise CheckpointError(f"{name[:60]} cannot be read ({error.strerror})") from error
        if size is None:
            raise CheckpointError(f"{name} is missing")
        if size < end:
            raise CheckpointError(f"{name} has {size} bytes, and its tensors reach to {end}")


def _stored(storage: Mapping[Any, Any]) -> Iterator[_Stored]:
    """Where each part of the tensors lies.

    Raises:
        CheckpointError: an entry does not say.
    """
    for entry in storage.values():
        state = entry.state if isinstance(entry, Kept) else None
        facts: dict[str, Any] = state if isinstance(state, dict) else {}
        file: Any = facts.get("relative_path")
        offset: Any = facts.get("offset")
        length: Any = facts.get("length")
        is_place = isinstance(file, str) and isinstance(offset, int) and isinstance(length, int)
        if not is_place or min(offset, length) < 0:
            raise CheckpointError(f"its {METADATA} does not say where a tensor is")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise CheckpointError(f"its {METADATA} names {file[:60]}, which is outside of it")
        yield _Stored(file, offset + length)


def _check_iteration(checkpoint: Path) -> None:
    """See that what a checkpoint says of itself agrees with its folder's number.

    Raises:
        CheckpointError: it does not, or cannot be read.
    """
    iteration = iteration_of(checkpoint)
    try:
        step = _step_in(checkpoint / TRAIN_STATE)
    except DataError as error:
        raise CheckpointError(f"its {TRAIN_STATE} cannot be used: {error}") from error
    if step != iteration:
        raise CheckpointError(f"its {TRAIN_STATE} is of iteration {step}")
    if not _has_common(checkpoint):
        return
    common = _loaded(checkpoint / COMMON, ANY_NAME, is_zip=True)
    told = common.get("iteration") if isinstance(common, dict) else None
    if told != iteration:
        raise CheckpointError(f"its {COMMON} is of iteration {told}")


def _has_common(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the format that keeps a file of what all ranks share."""
    try:
        backend = read_json(checkpoint / "metadata.json").get("sharded_backend")
    except (OSError, ValueError):
        return (checkpoint / COMMON).exists()
    return backend == "torch_dist"


def _loaded(path: Path, names: frozenset[tuple[str, str]], *, is_zip: bool) -> Any:
    """The content of a file of a checkpoint.

    Raises:
        CheckpointError: it is not there, or not trusted.
    """
    try:
        return contents(read_bytes(path, most=LARGEST), names, holds="a checkpoint", is_zip=is_zip)
    except OSError as error:
        raise CheckpointError(f"its {path.name} cannot be read ({error.strerror or error})") from error
    except DataError as error:
        raise CheckpointError(f"its {path.name} is not trusted: {error}") from error


def _step_in(path: Path) -> int:
    """The iteration that a state of a training is of.

    Raises:
        DataError: it does not say.
    """
    try:
        data = read_bytes(path, most=LARGEST)
    except OSError as error:
        raise DataError(f"it cannot be read ({error.strerror or error})") from error
    state = contents(data, TRAIN_STATE_NAMES, holds="a training's state", is_zip=True)
    step = integer_in(data, state.get("step")) if isinstance(state, dict) else None
    if step is None:
        raise DataError("it does not say its step")
    return step
