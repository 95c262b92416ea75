"""What Energon's metadata says of a dataset, without Energon: the samples of each shard, the shards of each split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, where it was built
INFO, SPLIT = (".info.json", ".info.yaml"), ("split.yaml", "split.json")
"""Energon's own order of looking; Energon 6 writes YAML alone."""


def prepared(folder: Path) -> bool:
    """Whether Energon takes a folder for a dataset."""
    return _first(folder, INFO) is not None


def metadata_files(folder: Path) -> list[Path]:
    """All that says what a dataset is, of Energon's."""
    return [file for file in sorted(folder.glob(".nv-meta/*")) if file.suffix in (".yaml", ".json")]


def faults(folder: Path) -> Iterator[str]:
    """What keeps Energon from reading the counts and the splits of a dataset."""
    for names, part, holds in ((INFO, "shard_counts", _are_counts), (SPLIT, "split_parts", _are_splits)):
        file = _first(folder, names)
        if file is None:
            yield f"{folder / '.nv-meta'} has no {' or '.join(names)}"
        elif (data := _data(file)) is None:
            yield f"{file} cannot be read: it is empty or damaged"
        elif not isinstance(data, dict) or not holds(data.get(part)):
            yield f"{file} has no {part} that Energon could read"


def shard_counts(folder: Path) -> dict[str, int] | None:
    """The samples of each shard; None when that cannot be told."""
    counts: dict[str, int] | None = _part(folder, INFO, "shard_counts", _are_counts)
    return counts


def split_shards(folder: Path) -> dict[str, list[str]] | None:
    """The shards of each split; None when that cannot be told."""
    parts = _part(folder, SPLIT, "split_parts", _are_splits)
    return None if parts is None else {name: [shard for pattern in patterns for shard in _expanded(pattern)] for name, patterns in parts.items()}


def split_counts(folder: Path) -> dict[str, int] | None:
    """Samples of each split; None when that cannot be told."""
    counts, splits = shard_counts(folder), split_shards(folder)
    return None if counts is None or splits is None else {name: sum(counts.get(shard, 0) for shard in shards) for name, shards in splits.items()}


def _part(folder: Path, names: tuple[str, ...], part: str, holds: Any) -> Any:
    data = _data(file) if (file := _first(folder, names)) else None
    found = data.get(part) if isinstance(data, dict) else None
    return found if holds(found) else None


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((file for name in names if (file := folder / ".nv-meta" / name).is_file()), None)


def _are_counts(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(name, str) and type(count) is int and count >= 0 for name, count in data.items())


def _are_splits(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(shards, list) and all(isinstance(shard, str) for shard in shards) for shards in data.values())


def _data(file: Path) -> Any:
    """What a file of metadata holds; None when it cannot be read."""
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _parsed(file: Path, modified: int, size: int) -> Any:
    try:
        text = file.read_text()
        return json.loads(text) if file.suffix == ".json" else yaml.load(text, _LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def _expanded(pattern: str) -> list[str]:
    """Energon's `shard-{000003..000005}.tar`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    low, high = match.groups()
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for i in range(int(low), int(high) + 1) for name in _expanded(f"{head}{i:0{len(low)}d}{tail}")]
