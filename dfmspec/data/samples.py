"""What a sample is, and what is said of one that is none: the checks and the trainer have it from here.

A sample is DFM's: three files of one name, next to one another in a shard.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A file of a sample that holds a tensor."""

    suffix: str
    axes: int


LATENT = Part(".pth", 4)
"""[C, T, H, W], or [1, C, T, H, W]."""
TEXT = Part(".pickle", 2)
"""[L, E], or [1, L, E]."""
PARTS = ("pth", "pickle", "json")
"""The files of a sample. Nothing of dfmspec's reads the description, .json; NVIDIA DFM takes no sample without."""
MOST_TOKENS = 512
"""Tokens of the longest texts that NVIDIA DFM encodes, by T5."""
WHY_NOT_MORE = f"T5's, as NVIDIA DFM encodes them, have at most {MOST_TOKENS}, and every token of a latent looks at all"
WHOLE = "a sample is .pth, .pickle and .json under one name"
SORTED = "write the tar sorted by name"


def missing(parts: Collection[str]) -> tuple[str, ...]:
    """The parts that a sample lacks."""
    return tuple(part for part in PARTS if part not in parts)


def missing_fault(lacking: Sequence[str]) -> str:
    """What is wrong with a sample that lacks some parts."""
    return f"it has no .{lacking[0]} file; {WHOLE}"


def apart_fault() -> str:
    """What is wrong with a sample whose parts have other samples' files between them."""
    return f"its parts are not next to one another in the shard; {SORTED}"


def axes_fault(shape: tuple[int, ...], part: Part) -> str:
    """What is wrong with the axes of a part's tensor, without a leading axis of 1; empty: nothing."""
    if len(shape) == part.axes:
        return ""
    shown = list(shape)
    return f"its {part.suffix} has shape {shown}, not {part.axes} axes"


def infinite_fault(part: Part) -> str:
    """What is wrong with values that are infinite or no numbers."""
    return f"its {part.suffix} has values that are not finite (NaN or inf, as fp32)"
