"""Processes that do not outlive their parent, and leave nothing half made."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel (Linux) for a SIGTERM when this process's parent dies, so that nothing is left behind."""
    with suppress(OSError, AttributeError):  # another system: the ordinary clean-up must do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def unwind_on_sigterm() -> None:
    """A SIGTERM ends this process by way of what removes half-made things; its own children end first, at once."""
    import multiprocessing

    def end(number: int, _: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def left_to_parent() -> None:
    """The same, and Ctrl-C, which a terminal sends to both, is the parent's: it ends this process with a SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
