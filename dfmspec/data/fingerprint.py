"""A dataset's fingerprint: its shards by name and size, and with `deep` by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dfmspec.data.energon_metadata import shards_there


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
    for place in sorted(shards_there(dataset)):
        shard = dataset / place
        name = place.encode("utf-8", "surrogateescape")
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
