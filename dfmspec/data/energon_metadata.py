"""What Energon's metadata says of a dataset, without Energon: the samples of each shard, the shards of each split."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfmspec.bounded import METADATA_BYTES, TooMuch, load_yaml, read_text

# The C loader reads the same, faster, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INFO = (".info.json", ".info.yaml")
SPLIT = ("split.yaml", "split.json")
"""Energon's own order of looking; Energon 6 writes YAML alone."""
Counts = dict[str, int]
"""Shard -> its samples."""
Splits = dict[str, list[str]]
"""Split -> its shards."""
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MOST_RANGES = 20
"""In one pattern."""
_MOST_SHARDS = 1_000_000
"""Which the patterns of a dataset stand for."""


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
    return [file for file in files if file.suffix in (".yaml", ".json")]


def faults(folder: Path) -> Iterator[str]:
    """What keeps Energon from reading the counts and the splits of a dataset."""
    for part in (_COUNTS, _SPLITS):
        fault = _fault(folder, part)
        if fault is not None:
            yield fault


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
        return f"{file} names more shards than are looked at, {_MOST_SHARDS}"
    return None


def shard_counts(folder: Path) -> Counts | None:
    """The samples of each shard; None when that cannot be told."""
    counts: Counts | None = _value(folder, _COUNTS)
    return counts


def split_shards(folder: Path) -> Splits | None:
    """The shards of each split; None when that cannot be told."""
    patterns: Splits | None = _value(folder, _SPLITS)
    if patterns is None or sum(map(_named, chain.from_iterable(patterns.values()))) > _MOST_SHARDS:
        return None
    return {name: _all_expanded(each) for name, each in patterns.items()}


def split_counts(folder: Path) -> dict[str, int] | None:
    """The samples of each split; None when that cannot be told."""
    counts = shard_counts(folder)
    splits = split_shards(folder)
    if counts is None or splits is None:
        return None
    return {name: _total(counts, shards) for name, shards in splits.items()}


def _total(counts: Counts, shards: list[str]) -> int:
    """The samples of some shards; one that is not counted has none."""
    return sum(counts.get(shard, 0) for shard in shards)


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


def _named(pattern: str) -> int:
    """How many names a pattern stands for."""
    ranges = _RANGE.findall(pattern)
    if len(ranges) > _MOST_RANGES:
        return _MOST_SHARDS + 1
    return math.prod(max(0, int(high) - int(low) + 1) for low, high in ranges)


def _expanded(pattern: str) -> list[str]:
    """The names that a pattern of Energon's stands for, such as `shard-{000003..000005}.tar`."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    low, high = match.groups()
    width = len(low)
    head = pattern[: match.start()]
    tail = pattern[match.end() :]

    # There may be another range in what follows.
    numbers = range(int(low), int(high) + 1)
    return _all_expanded(f"{head}{number:0{width}d}{tail}" for number in numbers)


def _all_expanded(patterns: Iterable[str]) -> list[str]:
    """The names that some patterns stand for, in their order."""
    names: list[str] = []
    for pattern in patterns:
        names += _expanded(pattern)
    return names
