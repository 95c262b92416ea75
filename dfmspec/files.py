"""Files are written whole, or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_named(path: Path, text: str) -> None:
    """Write a file that the user names, whole; where it is a link, what that leads to. What is no text is escaped.

    Raises:
        OSError: it cannot be written; nothing is left, and the error names the file.
    """
    printable = text.encode("utf-8", "backslashreplace").decode()
    if path.exists() and not path.is_file():  # a pipe, or a terminal
        path.write_text(printable, encoding="utf-8")
        return
    write_aside(Path(os.path.realpath(path)), printable)


def write_aside(path: Path, text: str) -> None:
    """Replace a file by a whole new one, on disk before it has the name.

    Raises:
        OSError: it cannot be written; nothing is left, and the error names the file.
    """
    unguessed = os.urandom(8).hex()
    aside = path.with_name(f".{path.name}.{unguessed}.tmp")
    try:
        # Whoever may write to the folder cannot have a link waiting under that name.
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
