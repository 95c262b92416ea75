"""Whole new lines of a file that somebody still writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 24
"""Bytes of a log that are read at a time."""
_LONGEST_LINE = 1 << 20
"""Bytes after which what has no end is no line."""


class GrowingLog:
    """A log, and how far it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Bytes of whole lines that were read."""

    def lines(self, *, is_last: bool = False) -> Iterator[str]:
        """The lines since the last call; none while the file is not there.

        Args:
            is_last: nobody writes any more: a line without an end is one.
        """
        while block := self._block():
            end = block.rfind(b"\n") + 1
            if end == 0 and (is_last or len(block) > _LONGEST_LINE):
                end = len(block)
            if end == 0:
                return
            self.offset += end
            yield from block[:end].decode(errors="replace").splitlines()

    def _block(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return file.read(_BLOCK)
        except OSError:  # it is not there yet
            return b""
