"""Files of a run are read back without trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = 64 * 2**20
"""Bytes of a file of JSON that are read; a run's have some thousand."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no ordinary file, or what is in it is no JSON object, or is too large or too deep for one.
    """
    if not path.is_file() and path.exists():
        raise ValueError("it is no ordinary file")
    with path.open("rb") as handle:
        text = handle.read(LARGEST + 1)
    if len(text) > LARGEST:
        mebibytes = LARGEST >> 20
        raise ValueError(f"it has more than {mebibytes} MiB")
    return json_object(text)


def json_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: it is none.
    """
    try:
        # File names need not be UTF-8.
        found = json.loads(text.decode("utf-8", "surrogateescape"))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found
