"""Colours on a terminal only, and never under NO_COLOR (https://no-color.org)."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TextIO

RED = "31"
GREEN = "32"
YELLOW = "33"
BLUE = "34"
CYAN = "36"


def painted(text: str, colour: str, stream: TextIO) -> str:
    """A text in a colour, where the stream that it is for shows colours.

    Args:
        text: what is written.
        colour: one of this module's.
        stream: where it goes.
    """
    return f"\x1b[{colour}m{text}\x1b[0m" if _shows_colours(stream) else text


@lru_cache
def _shows_colours(stream: TextIO) -> bool:
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if unwanted:
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()
