"""Faults of dfmspec itself: a file for a report, and what is said of it."""

from __future__ import annotations

import sys

from dfmspec import __version__
from dfmspec.redaction import known_here, redacted


def told(traceback: str) -> str:
    """Write a traceback down for a report; returns what the user is told."""
    return f"this is a fault of dfmspec, not of your spec; details are in {kept(traceback)}"


def kept(traceback: str) -> str:
    """Write a traceback into a new file, with the command that led to it; returns its path."""
    import tempfile

    with tempfile.NamedTemporaryFile("w", prefix="dfmspec-", suffix=".log", delete=False, errors="replace") as log:
        log.write(redacted(f"dfmspec {__version__}: {sys.argv}\n{traceback}", known_here()))
    return log.name
