"""Processes that do not outlive their parent, and leave nothing half made."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

# From Linux's <sys/prctl.h>, which Python does not have.
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel (Linux) for a SIGTERM when this process's parent dies, so that nothing is left behind."""
    # On another system the ordinary clean-up must do.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def unwind_on_sigterm() -> None:
    """Let a SIGTERM end this process by way of what removes half-made things; its own children end first, at once."""
    # The command line needs this module for other things, and starts faster without that one.
    import multiprocessing

    def end(number: int, _: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    # A child that is forked from here has nothing half made of its own.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def left_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it does.

    A terminal sends Ctrl-C to both; the parent then ends this process with a SIGTERM, on which it can clean up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
