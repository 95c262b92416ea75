"""Committed checkpoints as files: which there are, and whether they are whole. Without torch; the trainer writes them."""

from __future__ import annotations

import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"


def committed(folder: Path) -> list[Path]:
    """The checkpoints of a folder that were committed, newest first."""
    found = [path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name) and (path / MANIFEST).exists()]
    return sorted(found, key=iteration_of, reverse=True)


def unused(folder: Path) -> Path:
    """A folder that is not there yet: this one, or the same with a number."""
    return next(path for number in count(1) if not (path := folder if number == 1 else folder.with_name(f"{folder.name}-{number}")).exists())


def iteration_of(checkpoint: Path) -> int:
    """500 for `.../iter_0000500`."""
    return int(checkpoint.name[5:])


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None when every file has the size and checksum of its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        expectations = [(name, expected["size"], expected["crc32"]) for name, expected in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, size, _ in expectations:
        path = checkpoint / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    try:
        found = crc32s([checkpoint / name for name, _, _ in expectations])
    except OSError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} cannot be read ({error.strerror})"
    return next((f"{name} does not have its checksum" for (name, _, checksum), crc in zip(expectations, found, strict=True) if crc != checksum), None)


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
