"""Committed checkpoints as files, without torch: which there are, whether they are whole, which one a path means.

The trainer writes them (`trainer/checkpoint/writer.py`): a folder `iter_N` with a manifest of every file's size and
checksum.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

from dfmspec.errors import CheckpointError
from dfmspec.record.events import read_events
from dfmspec.record.run_dir import RunDir
from dfmspec.spec.checkpoints import MANIFEST, of_another
from dfmspec.spec.iterations import folder_of, iteration_folders, iteration_in

TRACKER = "latest_checkpointed_iteration.txt"


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were committed, the highest iteration first."""
    return [path for path in iteration_folders(folder) if (path / MANIFEST).exists()]


def iteration_of(checkpoint: Path) -> int:
    """500 for `.../iter_0000500`.

    Raises:
        ValueError: the folder is no checkpoint's.
    """
    found = iteration_in(checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint} is not named for an iteration")
    return found


def unused(folder: Path) -> Path:
    """A folder that is not there yet: this one, or one of its name with a number."""
    if not folder.exists():
        return folder
    for number in count(2):
        numbered = folder.with_name(f"{folder.name}-{number}")
        if not numbered.exists():
            return numbered
    raise AssertionError("numbers have no end")


def find(folder: Path, *, iteration: int | None, report: Callable[[str], None]) -> Path | None:
    """The checkpoint to load: the newest whole one, or that of `iteration`; None when there is nothing to resume from.

    Raises:
        CheckpointError: `iteration` is not there or not whole; or checkpoints exist and none is whole.
    """
    if iteration is not None:
        return _of_iteration(folder, iteration)

    # The newest first, down to one that is whole.
    candidates = iteration_folders(folder)
    for path in candidates:
        fault = problem(path)
        if fault is None:
            return path
        report(f"[WARNING] Checkpoint {path} is passed over: {fault}")
    if candidates:
        raise CheckpointError(
            _told_whose(candidates)
            or f"none of the {len(candidates)} checkpoints in {folder} is whole; "
            "to start afresh, move them away or set run.resume=never"
        )
    return None


def _of_iteration(folder: Path, iteration: int) -> Path:
    path = folder / folder_of(iteration)
    there = [str(iteration_of(found)) for found in committed(folder)]
    have = ", ".join(there) or "none"
    if not path.exists():
        raise CheckpointError(f"{folder} has no checkpoint of iteration {iteration}; it has: {have}")
    fault = problem(path)
    if fault:
        raise CheckpointError(f"checkpoint {path} is not whole: {fault}. Committed iterations: {have}")
    return path


def locate(place: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path means, with its manifest.

    It is the path itself, or the newest whole one of a folder or a run directory.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    if iteration_in(place.name) is not None and (place / MANIFEST).exists():
        fault = problem(place)
        if fault:
            raise CheckpointError(f"checkpoint {place} is not whole: {fault}")
        return place, read_manifest(place)

    # A run that saves elsewhere says where.
    run = RunDir(place)
    folders = [place, run.checkpoints]
    for event in reversed(read_events(run.events)):
        if event["type"] == "checkpoint":
            folders.append(Path(event["path"]).parent)
            break
    for folder in folders:
        for found in committed(folder):
            if problem(found) is None:
                return found, read_manifest(found)
    there = [place] if iteration_in(place.name) is not None else iteration_folders(place)
    raise CheckpointError(_told_whose(there) or f"{place} has no whole checkpoint (iter_N with {MANIFEST})")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: format_version, iteration, config_digest, config, files."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())
    return manifest


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None when every file has the size and checksum of its manifest."""
    whose = of_another(checkpoint, own=True)
    if whose is not None:
        return f"it is {whose}"
    try:
        files = read_manifest(checkpoint)["files"]
        expected = [(name, facts["size"], facts["crc32"]) for name, facts in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        return f"its {MANIFEST} cannot be read ({kind})"

    # Sizes first: they cost nothing.
    for name, size, _ in expected:
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        found_size = path.stat().st_size
        if found_size != size:
            return f"{name} has {found_size} bytes instead of {size}"

    # Then every byte.
    try:
        found = crc32s([checkpoint / name for name, _, _ in expected])
    except OSError as error:
        unread = Path(error.filename).relative_to(checkpoint)
        return f"{unread} cannot be read ({error.strerror})"
    for (name, _, checksum), crc in zip(expected, found, strict=True):
        if crc != checksum:
            return f"{name} does not have its checksum"
    return None


def crc32s(paths: list[Path]) -> list[str]:
    """CRC-32 of each file, eight hexadecimal digits; several at a time, for the sums leave Python's lock alone."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(_crc32, paths))


def _crc32(path: Path) -> str:
    value = 0
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def _told_whose(folders: list[Path]) -> str | None:
    """The error of checkpoints of another program, by the newest of them; None where they are not known as such."""
    whose = of_another(folders[0], own=True) if folders else None
    if whose is None:
        return None
    return f"checkpoint {folders[0]} is {whose}, which dfmspec's trainer cannot read; target dfm goes on from it"
