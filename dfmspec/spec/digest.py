"""Digests as records have them; of a configuration there is one, whatever order its keys stand in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dfmspec.files import write_aside

_MOST_REMEMBERED = 100
"""Files whose digests are kept."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration."""
    return text_digest(canonical(config))


def text_digest(text: str) -> str:
    """sha256 of a text, in which the name of a file may have bytes that are no UTF-8."""
    return bytes_digest(text.encode("utf-8", "surrogateescape"))


def bytes_digest(data: bytes) -> str:
    """sha256 of the content of a file."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a large file; one that was read before, and has the same size and time, is not read again.

    Raises:
        OSError: it cannot be read.
    """
    from platformdirs import user_cache_path

    memory = user_cache_path("dfmspec") / "digests.json"
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    known = _remembered(memory)
    if key in known:
        return known[key]
    with file.open("rb") as stream:
        found = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    kept = dict([*known.items(), (key, found)][-_MOST_REMEMBERED:])
    with suppress(OSError):  # then it is read each time
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_aside(memory, json.dumps(kept))
    return found


def _remembered(memory: Path) -> dict[str, str]:
    """The digests of files that were read before."""
    try:
        found = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
