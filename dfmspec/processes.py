"""A process that does not outlive its parent."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel (Linux) for a SIGTERM when this process's parent dies, so that nothing is left behind."""
    with suppress(OSError, AttributeError):  # another system: the ordinary clean-up must do
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
