"""What is read of files that somebody else names: so many bytes, values and levels, and never a device.

A spec names files, and those name others. Whoever checks specs of strangers, as continuous integration does, reads
whatever they name.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import yaml

SPEC_BYTES = 2**20
"""Of a spec, with all files that it builds on."""
METADATA_BYTES = 16 * 2**20
"""Of a file that says what a dataset or a checkpoint is."""
METADATA_VALUES = 300_000
"""Of such a file in YAML, whose values take memory one by one."""
METADATA_DEPTH = 100
"""Levels of such a file in YAML."""

_MOST_DIRECTIVES = 100
"""Of a YAML text; a parser compares each with all."""

_SPECIAL: dict[str, Callable[[int], bool]] = {
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": stat.S_ISCHR,
    "a disk": stat.S_ISBLK,
}
"""What a path may name that has no end, or waits for somebody."""


class TooLarge(OSError):
    """A file that has more bytes than are read; its strerror says how many are."""


def read_bytes(file: Path | str, *, most: int, may_be_a_pipe: bool = False) -> bytes:
    """The bytes of a regular file; nothing is waited for.

    Args:
        file: its path.
        most: how many bytes it may have.
        may_be_a_pipe: a pipe is read as well, and waited for, as `<(...)` of a shell is.

    Raises:
        TooLarge: it has more.
        OSError: it cannot be read, or is no regular file.
    """
    is_pipe = may_be_a_pipe and Path(file).is_fifo()
    with Path(file).open("rb") if is_pipe else open_regular(file) as handle:
        return read_stream(handle, str(file), most=most)


def open_regular(file: Path | str) -> IO[bytes]:
    """A regular file, open for reading.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    # Looked at before it is opened, which alone may wait, or rewind a tape; and after, when it may be another.
    _refuse_special(Path(file).stat().st_mode, file)
    handle = os.fdopen(os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    try:
        _refuse_special(os.fstat(handle.fileno()).st_mode, file)
    except OSError:
        handle.close()
        raise
    return handle


def read_text(file: Path | str, *, most: int, errors: str = "strict", may_be_a_pipe: bool = False) -> str:
    """The text of a regular file in UTF-8, with line ends as Python has them.

    Raises:
        TooLarge: it has more than `most` bytes.
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no UTF-8, unless `errors` says what becomes of that.
    """
    text = read_bytes(file, most=most, may_be_a_pipe=may_be_a_pipe).decode("utf-8", errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_beginning(file: Path | str, *, most: int) -> bytes:
    """The first bytes of a regular file; all, where it has no more than `most`.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    with open_regular(file) as handle:
        return handle.read(most) or b""


def read_stream(stream: IO[bytes], name: str, *, most: int) -> bytes:
    """The bytes of an open file up to its end.

    Raises:
        TooLarge: there are more than `most`.
    """
    raw = stream.read(most + 1) or b""  # None: nothing yet, of a file that would have to be waited for
    if len(raw) > most:
        raise TooLarge(errno.EFBIG, f"it has more than {_in_words(most)}, which is all that is read of it", name)
    return raw


def _refuse_special(mode: int, file: Path | str) -> None:
    """Stop at what is no regular file.

    Raises:
        OSError: it is a folder, a device, a pipe or a socket.
    """
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    for words, is_one in _SPECIAL.items():
        if is_one(mode):
            raise OSError(errno.EINVAL, f"it is {words}; name a regular file", str(file))


def _in_words(count: int) -> str:
    """A number of bytes as a message says it."""
    if count >= 2**20:
        return f"{count >> 20} MiB"
    return f"{count} bytes"


# YAML.


class TooMuch(ValueError):
    """A text that holds more values, or nests deeper, than is built of it; where it begins to, from 1."""

    def __init__(self, message: str, line: int = 1, column: int = 1) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


def refuse_excess(text: str, loader: Any, *, values: int = METADATA_VALUES, depth: int = METADATA_DEPTH) -> None:
    """Stop at a YAML text that holds too much, aliases apart, without building it.

    A parser's nodes take a hundred times the memory of their text, and its recursion has no bound of its own.

    Raises:
        TooMuch: it has too many values, levels or directives.
        yaml.YAMLError: it is no YAML.
    """
    if text.count("\n%") > _MOST_DIRECTIVES:
        raise TooMuch(f"more than {_MOST_DIRECTIVES} directives (lines that begin with %)")
    if not _may_exceed(text, values, depth):
        return
    level = 0
    count = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            level += isinstance(event, yaml.CollectionStartEvent)
        mark: Any = event.start_mark
        if level > depth:
            raise TooMuch(f"the nesting is deeper than {depth}", mark.line + 1, mark.column + 1)
        if count > values:
            raise TooMuch(f"more than {values} values", mark.line + 1, mark.column + 1)


def _may_exceed(text: str, values: int, depth: int) -> bool:
    """Whether a text has so many signs, or is so far indented, that it must be looked at."""
    if len(text) <= depth:
        return False
    # Every value but the first stands behind one of these; a bracket is one, and may hold one.
    signs = sum(text.count(sign) for sign in ",:?-[{")
    if 2 * signs >= values:
        return True
    # Not enough in it to harm anybody: what builds it counts.
    openings = sum(text.count(sign) for sign in ("[", "{", "- ", "?", ": "))
    return openings >= 2000 or re.search(rf"(?m)^ {{{depth},}}", text) is not None


def load_yaml(text: str, loader: Any) -> Any:
    """What a YAML text of metadata holds, by one of PyYAML's loaders.

    Raises:
        TooMuch: it does, aliases and merge keys counted as what they stand for.
        yaml.YAMLError: it is none.
    """
    refuse_excess(text, loader)
    data = yaml.load(text, _merging_little(loader))
    if _values_in(data) > METADATA_VALUES:
        raise TooMuch(f"more than {METADATA_VALUES} values, through aliases")
    return data


@lru_cache
def _merging_little(loader: Any) -> Any:
    """A loader that stops where merge keys grow: each one copies the entries of what it names."""

    class Loader(loader):  # type: ignore[misc]
        merged = 0

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            self.merged += len(node.value)
            if self.merged > METADATA_VALUES:
                raise TooMuch(f"more than {METADATA_VALUES} values, through merge keys")

    return Loader


def _values_in(data: Any) -> int:
    """How many values there are in some data, each as often as it is met; no more are counted than there may be."""
    count = 0
    left = [data]
    while left and count <= METADATA_VALUES:
        node = left.pop()
        count += 1
        if isinstance(node, dict):
            left += node.values()
        elif isinstance(node, list):
            left += node
    return count
