"""What an attempt left, without secrets: what ranks print is not ours, and may be anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dfmspec.files import write_aside
from dfmspec.redaction import known_here, redacted

_MOST = 256 * 2**20
"""Bytes of a file that is looked at; a longer one is left, and told."""


def scrub(folder: Path) -> list[Path]:
    """Take the secrets out of the files of an attempt that has ended.

    Returns:
        Those that are too long to be looked at.
    """
    left = []
    known = known_here()
    for file in _files(folder):
        try:
            if file.stat().st_size > _MOST:
                left.append(file)
                continue
            text = file.read_bytes().decode(errors="surrogateescape")
            clean = redacted(text, known)
            if clean != text:
                write_aside(file, clean)
        except OSError:  # it is gone, or somebody else's
            continue
    return left


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            if file.is_file() and not file.is_symlink():
                yield file
