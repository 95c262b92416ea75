"""How a command of the trainer ends: an expected error is one line, as the command line itself has it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from dfmspec.errors import PREFLIGHT, DfmspecError


def say(line: str) -> None:
    """One line on the error stream."""
    print(line, file=sys.stderr, flush=True)


def ended(command: Callable[[], int], out: Path | None) -> int:
    """The exit code of a command, or of the error that ended it.

    `out`: where the command writes, for errors that do not say it.
    """
    try:
        return command()
    except DfmspecError as error:
        say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        place = f"{out}: " if out is not None and error.filename is None else ""
        say(f"error: {place}{error}")
        return PREFLIGHT
