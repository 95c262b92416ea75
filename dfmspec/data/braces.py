"""Names that stand for several, as Energon's metadata has them: `shard-{000003..000005}.tar`, `{a,b}.tar`, nested.

A backslash takes a brace or a comma as it is. The forms are those of the package braceexpand, by which Energon reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import product
from string import ascii_lowercase, ascii_uppercase

_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = ascii_uppercase + ascii_lowercase
MOST_NAMES = 1_000_000
"""That the patterns of a dataset may stand for."""
_MOST_PARTS = 100
"""Of one pattern: what is in braces, and what stands between."""


class TooManyNames(Exception):
    """Patterns stand for more than MOST_NAMES."""


def expanded(patterns: Iterable[str]) -> list[str]:
    """The names that some patterns stand for, in their order; one whose braces do not match stands for itself.

    Raises:
        TooManyNames: they are more than MOST_NAMES.
    """
    names: list[str] = []
    for pattern in patterns:
        try:
            found = _expanded(pattern)
        except (ValueError, RecursionError):
            found = [pattern]
        if len(names) + len(found) > MOST_NAMES:
            raise TooManyNames
        names += [re.sub(r"\\(.)", r"\1", name) for name in found]
    return names


def _expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for, backslashes left in.

    Raises:
        ValueError: its braces do not match.
    """
    parts: list[list[str]] = []
    start = 0
    for first, last in _groups(pattern):
        parts.append([pattern[start:first]])
        parts.append(_choices(pattern[first + 1 : last]))
        start = last + 1
    parts.append([pattern[start:]])
    if len(parts) > _MOST_PARTS or math.prod(map(len, parts)) > MOST_NAMES:
        raise TooManyNames
    return ["".join(choice) for choice in product(*parts)]


def _groups(text: str) -> list[tuple[int, int]]:
    """Where the outermost braces open and close."""
    groups = []
    first = 0
    for place, mark, depth in _marks(text):
        if mark == "{" and depth == 1:
            first = place
        elif mark == "}" and depth == 0:
            groups.append((first, place))
    return groups


def _marks(text: str) -> list[tuple[int, str, int]]:
    """(place, mark, how many braces are open after it) of each brace and comma without a backslash."""
    marks = []
    depth = 0
    for match in re.finditer(r"\\.|[{},]", text):
        mark = match.group()
        if mark[0] == "\\":
            continue
        depth += {"{": 1, "}": -1, ",": 0}[mark]
        if depth < 0:
            raise ValueError("a brace closes that was not opened")
        marks.append((match.start(), mark, depth))
    if depth:
        raise ValueError("a brace is not closed")
    return marks


def _choices(inner: str) -> list[str]:
    """What a pair of braces stands for."""
    numbers = _NUMBERS.fullmatch(inner)
    if numbers:
        return _numbers(*numbers.groups())
    letters = _LETTERS.fullmatch(inner)
    if letters:
        first, last, step = letters.groups()
        places = _range(_ALPHABET.index(first), _ALPHABET.index(last), step)
        return [_ALPHABET[place] for place in places]

    # A list; without a comma, the braces are a part of the name.
    commas = [place for place, mark, depth in _marks(inner) if mark == "," and depth == 0]
    if not commas:
        return [f"{{{name}}}" for name in _expanded(inner)]
    found: list[str] = []
    starts = [0, *(place + 1 for place in commas)]
    for start, end in zip(starts, [*commas, len(inner)], strict=True):
        found += _expanded(inner[start:end])
    return found


def _numbers(first: str, last: str, step: str | None) -> list[str]:
    """The numbers of a range; where one is written with leading zeros, all are as wide."""
    is_padded = any(text.startswith(("0", "-0")) and text not in ("0", "-0") for text in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    return [f"{number:0{width}d}" for number in _range(int(first), int(last), step)]


def _range(first: int, last: int, step: str | None) -> range:
    """From one to the other, upwards or downwards.

    Raises:
        TooManyNames: there are more than MOST_NAMES between them.
    """
    by = int(step or 1) or 1
    if abs(last - first) // by > MOST_NAMES:
        raise TooManyNames
    return range(first, last + 1, by) if first <= last else range(first, last - 1, -by)
