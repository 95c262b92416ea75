"""Committed checkpoints as files, without torch: which there are, whether they are whole, which one a path means.

The trainer writes them (`trainer/checkpoint/writer.py`): a folder `iter_N` with a manifest of every file's size and
checksum. None is trusted: the pickles of one are gone through here before torch has them; of its shards torch reads
tensors alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from dfmspec.data.pickles import COMMON_NAMES, METADATA_NAMES, STREAM_NAMES, Name, look_through
from dfmspec.errors import CheckpointError, DataError
from dfmspec.record.files import json_object, read_json, read_whole
from dfmspec.spec.checkpoints import MANIFEST, is_committed, of_another
from dfmspec.spec.digest import bytes_digest, config_digest
from dfmspec.spec.iterations import folder_of, iteration_folders, iteration_in

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_VERSION = 1
METADATA = ".metadata"
COMMON = "common.pt"
SHARED = (METADATA, COMMON, "metadata.json")
"""What every checkpoint has once, whatever its layout."""
STREAMS = "streams"

Digests = Mapping[int, str]
"""The digest of the manifest of each checkpoint, by iteration, as the run wrote it down when it was committed."""


class _File(NamedTuple):
    """A file of a checkpoint, as its manifest has it."""

    name: str
    size: int
    crc32: str


def stream_file(index: int) -> str:
    """The name of the file with the state of a stream, in a checkpoint."""
    return f"{STREAMS}/stream_{index:05d}.pt"


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were committed, the highest iteration first."""
    return [path for path in iteration_folders(folder) if is_committed(path, own=True)]


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


def find(
    folder: Path,
    *,
    iteration: int | None,
    report: Callable[[str], None],
    digests: Digests,
) -> Path | None:
    """The checkpoint to load: the newest whole one, or that of `iteration`; None when there is nothing to resume from.

    Args:
        folder: where checkpoints are.
        iteration: the one that is wanted; None: the newest.
        report: where those that are passed over are told.
        digests: what the run knows of them.

    Raises:
        CheckpointError: `iteration` is not there or not whole; or checkpoints exist and none is whole.
    """
    if iteration is not None:
        return _of_iteration(folder, iteration, digests)

    # The newest first, down to one that is whole.
    candidates = iteration_folders(folder)
    for path in candidates:
        fault = problem(path, digests)
        if fault is None:
            return path
        report(f"[WARNING] Checkpoint {path} is passed over: {fault}")
    if candidates:
        raise CheckpointError(
            told_whose(candidates)
            or f"none of the {len(candidates)} checkpoints in {folder} is whole; "
            "to start afresh, give checkpoint.save another folder or set run.resume=never"
        )
    return None


def _of_iteration(folder: Path, iteration: int, digests: Digests) -> Path:
    path = folder / folder_of(iteration)
    there = [str(iteration_of(found)) for found in committed(folder)]
    have = ", ".join(there) or "none"
    if not path.exists():
        raise CheckpointError(f"{folder} has no checkpoint of iteration {iteration}; it has: {have}")
    fault = problem(path, digests)
    if fault:
        raise CheckpointError(f"checkpoint {path} is not whole: {fault}. Committed iterations: {have}")
    return path


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: format_version, iteration, config_digest, config, files."""
    return read_json(checkpoint / MANIFEST)


def manifest_digest(checkpoint: Path) -> str:
    """sha256 of a checkpoint's manifest, which has those of all its files."""
    return bytes_digest((checkpoint / MANIFEST).read_bytes())


def problem(checkpoint: Path, digests: Digests | None = None) -> str | None:
    """Why a checkpoint cannot be used; None when it is whole, its own, and nothing in it is a program.

    Args:
        checkpoint: its folder.
        digests: what the run knows of its checkpoints; None: nothing.
    """
    whose = of_another(checkpoint, own=True)
    if whose is not None:
        return f"it is {whose}"
    try:
        text = read_whole(checkpoint / MANIFEST)
        manifest = json_object(text)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        return f"its {MANIFEST} cannot be read ({said})"
    known = (digests or {}).get(iteration_of(checkpoint))
    if known is not None and bytes_digest(text) != known:
        return f"its {MANIFEST} is not the one that was committed"
    try:
        _check_manifest(checkpoint, manifest)
        _check_files(checkpoint, _files(manifest))
    except CheckpointError as error:
        return str(error)
    return None


def newest_described(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that says what it is; whether its files are whole is not looked at."""
    for path in committed(folder):
        try:
            _check_manifest(path, read_manifest(path))
        except (OSError, ValueError, CheckpointError):
            continue
        return path
    return None


_KINDS = {"iteration": int, "config_digest": str, "config": dict, "files": dict}
"""What a manifest must have."""


def _check_manifest(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Look at what a manifest says beside its files.

    Raises:
        CheckpointError: it is of another version, of another folder, or damaged.
    """
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"its {MANIFEST} has format_version {version!r}, and this version reads {FORMAT_VERSION}")
    for key, kind in _KINDS.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"its {MANIFEST} has no {key}")
    iteration = manifest["iteration"]
    if iteration != iteration_of(checkpoint):
        raise CheckpointError(f"its {MANIFEST} is that of iteration {iteration}")
    if config_digest(manifest["config"]) != manifest["config_digest"]:
        raise CheckpointError(f"its {MANIFEST} does not have its configuration's digest")


def _files(manifest: Mapping[str, Any]) -> list[_File]:
    """The files that a manifest lists.

    Raises:
        CheckpointError: the list is damaged, or lacks what every checkpoint has.
    """
    found = []
    for name, facts in manifest["files"].items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise CheckpointError(f"its {MANIFEST} names {name}, which is outside of it")
        try:
            file = _File(name, facts["size"], facts["crc32"])
        except (KeyError, TypeError):
            raise CheckpointError(f"its {MANIFEST} has no size and checksum of {name}") from None
        found.append(file)
    missing = set(_required(manifest)) - {file.name for file in found}
    if missing:
        first = min(missing)
        raise CheckpointError(f"its {MANIFEST} does not list {first}")
    return found


def _required(manifest: Mapping[str, Any]) -> list[str]:
    """The files without which nothing can be loaded."""
    data = manifest["config"].get("data")
    streams = data.get("num_streams") if isinstance(data, dict) else None
    if not isinstance(streams, int) or not 0 < streams <= len(manifest["files"]):
        raise CheckpointError(f"its {MANIFEST} has no data.num_streams")
    return [*SHARED, *map(stream_file, range(streams))]


def _check_files(checkpoint: Path, files: list[_File]) -> None:
    """Compare every file with the manifest, and go through those that are pickles.

    Raises:
        CheckpointError: one is missing, cut, changed, or a program.
    """
    # Sizes first: they cost nothing.
    for file in files:
        path = checkpoint / file.name
        try:
            is_file = path.is_file()
            size = path.stat().st_size if is_file else 0
        except OSError as error:
            raise CheckpointError(f"{file.name[:60]} cannot be read ({error.strerror})") from error
        if not is_file:
            raise CheckpointError(f"{file.name} is missing")
        if size != file.size:
            raise CheckpointError(f"{file.name} has {size} bytes instead of {file.size}")

    # Then every byte.
    try:
        found = crc32s([checkpoint / file.name for file in files])
    except OSError as error:
        unread = Path(error.filename).name if error.filename else "a file"
        raise CheckpointError(f"{unread} cannot be read ({error.strerror})") from error
    for file, crc in zip(files, found, strict=True):
        if crc != file.crc32:
            raise CheckpointError(f"{file.name} does not have its checksum")

    # Then what is going to be unpickled.
    for file in files:
        names = _names(file.name)
        if names is None:
            continue
        try:
            look_through(
                (checkpoint / file.name).read_bytes(), names, holds="a checkpoint", is_zip=file.name != METADATA
            )
        except DataError as error:
            raise CheckpointError(f"{file.name} is not trusted: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{file.name} cannot be read ({error.strerror})") from error


def _names(file: str) -> frozenset[Name] | None:
    """What the pickle in a file of a checkpoint may use; None: the file is none."""
    if file.startswith(f"{STREAMS}/"):
        return STREAM_NAMES
    return {METADATA: METADATA_NAMES, COMMON: COMMON_NAMES}.get(file)


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


def told_whose(folders: list[Path]) -> str | None:
    """The error of checkpoints of another program, by the newest of them; None where they are not known as such."""
    whose = of_another(folders[0], own=True) if folders else None
    if whose is None:
        return None
    return f"checkpoint {folders[0]} is {whose}, which dfmspec's trainer cannot read; target dfm goes on from it"
