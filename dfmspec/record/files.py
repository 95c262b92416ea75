"""Files of a run are read back without trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dfmspec.bounded import read_bytes

LARGEST = 64 * 2**20
"""Bytes of a file of JSON that are read; a run's have some thousand."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        OSError: it cannot be read, or is larger than any of a run.
        ValueError: it is no ordinary file, or what is in it is no JSON object, or too deep for one.
    """
    return json_object(read_whole(path))


def read_whole(path: Path) -> bytes:
    """The content of a file of JSON.

    Raises:
        OSError: it cannot be read, or is larger than any of a run.
        ValueError: it is no ordinary file.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no ordinary file")
    return read_bytes(path, most=LARGEST)


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
