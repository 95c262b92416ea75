"""A shard as Energon walks it: its members in their order, a sample ending where the next one's name begins."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""Energon's own way to split a member's name into the sample's and the part's."""
_PASSED_OVER = re.compile(r"__[^/]*__($|/)")
"""Names that Energon does not look at."""


class Member(NamedTuple):
    """A file of a shard."""

    key: str
    """The sample's name."""
    part: str
    """Its suffix, without the first dot."""
    info: tarfile.TarInfo
    begins: bool
    """Whether a sample begins with it: the file before is another sample's."""


def opened(shard: Path) -> tarfile.TarFile:
    """A shard, which Energon does not take compressed."""
    return tarfile.open(shard, "r:")


def members(tar: tarfile.TarFile) -> Iterator[Member]:
    """The files of samples, in their order."""
    last = None
    for info in tar:
        match = _SAMPLE_NAME.match(info.name)
        if match is None or not info.isfile() or _PASSED_OVER.match(info.name):
            continue
        key, part = match.groups()
        yield Member(key, part, info, begins=key != last)
        last = key


def keys(shard: Path) -> tuple[str, ...]:
    """The name of each sample of a shard, in their order; nothing of a shard that cannot be read."""
    try:
        stat = shard.stat()
        return _keys(shard, stat.st_mtime_ns, stat.st_size)
    except (tarfile.TarError, OSError, EOFError):
        return ()


@lru_cache(maxsize=64)
def _keys(shard: Path, modified: int, size: int) -> tuple[str, ...]:
    """The names of a shard's samples; one that was changed has another time or size, and is read anew."""
    with opened(shard) as tar:
        return tuple(member.key for member in members(tar) if member.begins)
