"""What Energon's metadata says of a dataset, without Energon: the samples of each shard, the shards of each split, and
what of them is excluded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfmspec.bounded import METADATA_BYTES, TooMuch, load_yaml, read_text
from dfmspec.data.braces import MOST_NAMES, TooManyNames, expanded

# The C loader reads the same, faster, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INFO = (".info.json", ".info.yaml")
SPLIT = ("split.yaml", "split.json")
"""Energon's own order of looking; Energon 6 writes YAML alone."""
Counts = dict[str, int]
"""Shard -> its samples."""
Splits = dict[str, list[str]]
"""Split -> its shards."""


class _Part(NamedTuple):
    """A part of the metadata that dfmspec reads."""

    files: tuple[str, ...]
    """Names of the files that may hold it; the first that is there does."""
    key: str
    """Its key in the file."""
    is_valid: Callable[[Any], bool]
    """Whether Energon could read a value of that key."""


def prepared(folder: Path) -> bool:
    """Whether Energon takes a folder for a dataset."""
    return _first(folder, INFO) is not None


def metadata_files(folder: Path) -> list[Path]:
    """Energon's files that say what a dataset is."""
    files = sorted(folder.glob(".nv-meta/*"))
    found = [file for file in files if file.suffix in (".yaml", ".json")]

    # The same in the older form says nothing of its own.
    names = {file.name for file in found}
    return [file for file in found if file.name != ".info.yaml" or ".info.json" not in names]


def faults(folder: Path) -> Iterator[str]:
    """What keeps Energon from reading the counts and the splits of a dataset."""
    for part in (_COUNTS, _SPLITS):
        fault = _fault(folder, part)
        if fault is not None:
            yield fault

    # What is excluded need not be said.
    file = _first(folder, SPLIT)
    data = None if file is None else _contents(file)[0]
    if isinstance(data, dict) and _EXCLUDED.key in data and _value(folder, _EXCLUDED) is None:
        yield f"{file} has no {_EXCLUDED.key} that Energon could read"


def _fault(folder: Path, part: _Part) -> str | None:
    """What keeps Energon from reading a part of the metadata; None: nothing."""
    file = _first(folder, part.files)
    if file is None:
        metadata = folder / ".nv-meta"
        names = " or ".join(part.files)
        return f"{metadata} has no {names}"
    data, reason = _contents(file)
    if data is None:
        return f"{file} cannot be read: {reason}"
    if _value(folder, part) is None:
        return f"{file} has no {part.key} that Energon could read"
    if part is _SPLITS and split_shards(folder) is None:
        return f"{file} names more shards than are looked at, {MOST_NAMES}"
    return None


def shard_counts(folder: Path) -> Counts | None:
    """The samples of each shard; None when that cannot be told."""
    counts: Counts | None = _value(folder, _COUNTS)
    return counts


def split_shards(folder: Path) -> Splits | None:
    """The shards of each split that are read; None when that cannot be told."""
    patterns: Splits | None = _value(folder, _SPLITS)
    if patterns is None:
        return None
    splits = {}
    try:
        left_out = frozenset(expanded(_value(folder, _EXCLUDED) or ()))
        for name, each in patterns.items():
            splits[name] = [shard for shard in expanded(each) if shard not in left_out]
    except TooManyNames:
        return None
    return splits


def excluded(folder: Path) -> frozenset[str]:
    """What is never read: names of shards, and of samples as `shard/key`."""
    try:
        return frozenset(expanded(_value(folder, _EXCLUDED) or ()))
    except TooManyNames:  # then `split_shards` cannot be told either
        return frozenset()


def shards_there(folder: Path) -> set[str]:
    """The shards that are in a folder, in folders within it, and in what is linked into it."""
    names: set[str] = set()

    # A folder that links lead to twice is entered once, so that a circle ends.
    entered: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(f"{place}/{name}") not in entered]
        shards = [name for name in files if name.endswith(".tar")]
        names.update(os.path.relpath(f"{place}/{name}", folder) for name in shards)

    # What the metadata names is opened by its path, whichever way that leads.
    named = set(shard_counts(folder) or ()).union(*(split_shards(folder) or {}).values())
    names.update(name for name in named - names if _is_file(folder / name))
    return names


def _is_file(place: Path) -> bool:
    return os.path.isfile(place)  # noqa: PTH113  which a name too long does not stop


def split_counts(folder: Path) -> dict[str, int] | None:
    """The samples of each split that are read; None when that cannot be told."""
    splits = split_shards(folder)
    if splits is None or shard_counts(folder) is None:
        return None
    counts = {}
    for name in splits:
        counts[name] = sum(kept.count(1) for kept in _kept(folder, splits[name]))
    return counts


def streams_without_sample(folder: Path, split: str, streams: int) -> int:
    """How many of the streams that share a split surely have none of its samples left.

    Energon deals samples out in rows, before it looks which are excluded; which row is one longer than the others is
    its own choice, and not foretold here.
    """
    kept = b"".join(_kept(folder, (split_shards(folder) or {}).get(split, [])))
    row, longer = divmod(len(kept), streams)
    empty = 0
    for stream in range(streams):
        end = (stream + 1) * row + min(stream + 1, longer)
        empty += not any(kept[stream * row : end])
    return empty


def _kept(folder: Path, shards: list[str]) -> Iterator[bytes]:
    """Which samples of each shard are read: a byte a sample, in Energon's order, which is 0 where it is excluded.

    A shard that is not counted has no samples.
    """
    counts = shard_counts(folder) or {}
    left_out = excluded(folder)
    with_excluded: set[str] = set()
    for name in left_out:
        with_excluded.update(_beginnings(name))
    for shard in shards:
        kept = b"\1" * counts.get(shard, 0)
        yield _without(folder, shard, kept, left_out) if shard in with_excluded else kept


def _beginnings(name: str) -> Iterator[str]:
    """What may be the shard in `shard/key`, for either may have slashes."""
    place = name.find("/")
    while place >= 0:
        yield name[:place]
        place = name.find("/", place + 1)


def _without(folder: Path, shard: str, kept: bytes, left_out: frozenset[str]) -> bytes:
    """Which samples of a shard are read, some of which are excluded: the shard is opened for their names."""
    from dfmspec.data.tars import keys

    found = keys(folder / shard)
    left = bytearray(kept)
    for index, key in enumerate(found[: len(kept)]):
        left[index] = f"{shard}/{key}" not in left_out
    if not found:  # it cannot be read: what the names say is taken to be there
        gone = sum(name.startswith(f"{shard}/") for name in left_out)
        left[:gone] = bytes(min(gone, len(kept)))
    return bytes(left)


def _value(folder: Path, part: _Part) -> Any:
    """The value of a part; None when Energon could not read it."""
    file = _first(folder, part.files)
    if file is None:
        return None
    data, _ = _contents(file)
    if not isinstance(data, dict):
        return None
    found = data.get(part.key)
    return found if part.is_valid(found) else None


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """What the first file of some names holds; empty where there is none, or it is damaged."""
    file = _first(folder, names)
    data = None if file is None else _contents(file)[0]
    return data if isinstance(data, dict) else {}


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first file of some names that a dataset has."""
    for name in names:
        file = folder / ".nv-meta" / name
        if file.is_file():
            return file
    return None


def _are_counts(data: Any) -> bool:
    """Whether a value is a map of shards to numbers of samples."""
    if not isinstance(data, dict):
        return False
    return all(_is_count(name, count) for name, count in data.items())


def _is_count(name: Any, count: Any) -> bool:
    # By type: a bool, which is an int too, is no count.
    return isinstance(name, str) and type(count) is int and count >= 0


def _are_splits(data: Any) -> bool:
    """Whether a value is a map of splits to lists of shards."""
    if not isinstance(data, dict):
        return False
    return all(_are_texts(shards) for shards in data.values())


def _are_texts(data: Any) -> bool:
    if not isinstance(data, list):
        return False
    return all(isinstance(text, str) for text in data)


_COUNTS = _Part(INFO, "shard_counts", _are_counts)
_SPLITS = _Part(SPLIT, "split_parts", _are_splits)
_EXCLUDED = _Part(SPLIT, "exclude", _are_texts)


def _contents(file: Path) -> tuple[Any, str]:
    """What a file of metadata holds; None, and why, when it cannot be read."""
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _parsed(file: Path, modified: int, size: int) -> tuple[Any, str]:
    """What a file holds; one that was changed has another time or size, and is read anew."""
    try:
        text = read_text(file, most=METADATA_BYTES)
        data = json.loads(text) if file.suffix == ".json" else load_yaml(text, _LOADER)
    except OSError as error:
        return None, error.strerror or str(error)
    except TooMuch as error:
        return None, str(error)
    except (ValueError, RecursionError, yaml.YAMLError):
        data = None
    return data, "it is empty or damaged"
