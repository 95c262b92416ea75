"""A dataset's fingerprint: its shards by name and size, and with `deep` by their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHARDS = (".tar", ".tgz", ".tar.gz")
_MOST = 1_000_000
"""Shards of a dataset."""


def fingerprint(dataset: Path, *, deep: bool = False) -> dict[str, Any] | None:
    """What a folder of shards is now; None where there is no such folder.

    Returns:
        path; shards, their number; bytes; sizes, a sha256 over names and sizes; with `deep` content, one over names and
        contents.
    """
    if not dataset.is_dir():
        return None
    sizes = hashlib.sha256()
    content = hashlib.sha256()
    count = 0
    total = 0
    for shard in _shards(dataset):
        name = shard.relative_to(dataset).as_posix().encode("utf-8", "surrogateescape")
        size = shard.stat().st_size
        count += 1
        total += size
        sizes.update(b"%s\0%d\n" % (name, size))
        if deep:
            with shard.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            content.update(b"%s\0%s\n" % (name, digest.encode()))
    found: dict[str, Any] = {
        "path": str(dataset.absolute()),
        "shards": count,
        "bytes": total,
        "sizes": f"sha256:{sizes.hexdigest()}",
    }
    if deep:
        found["content"] = f"sha256:{content.hexdigest()}"
    return found


def _shards(dataset: Path) -> Iterator[Path]:
    """The shards under a folder, by name."""
    found = []
    for parent, folders, names in os.walk(dataset):
        folders.sort()
        found += [Path(parent, name) for name in names if name.endswith(_SHARDS)]
        if len(found) > _MOST:
            break
    yield from sorted(found)
