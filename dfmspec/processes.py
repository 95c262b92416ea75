"""Processes that do not outlive their parent, and leave nothing half made."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from dfmspec.errors import PreflightError

# From Linux's <sys/prctl.h>, which Python does not have.
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel (Linux) for a SIGTERM when this process's parent dies, so that nothing is left behind.

    `parent`: the process that started this one, where it is known; when it is gone already, this one ends at once.
    """
    # On another system the ordinary clean-up must do.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if parent is not None and os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)


def die_with_torchrun() -> None:
    """End with the torchrun that started this process; at once, and with a word, when it is gone already."""
    die_with_parent()
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # started without one
        return

    # A wrapper may stand between, and a program of one's own may start ranks as torchrun does.
    import psutil

    try:
        lines = [" ".join(process.cmdline()) for process in psutil.Process().parents()]
    except psutil.Error:  # another user's
        return
    is_there = any("torchrun" in line or "torch.distributed" in line for line in lines)
    is_own_program = bool(lines) and "python" in lines[0]
    if not is_there and not is_own_program:  # somebody has adopted this process
        print("error: the torchrun that started this process is gone", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


_LONGEST_FOLDER = 75
"""Characters of a folder in which multiprocessing's sockets still have a path of at most 107, the kernel's limit."""


def short_temporary_folder() -> None:
    """Let this process and its children have their temporary files in /tmp, where TMPDIR is too long for sockets.

    Raises:
        PreflightError: /tmp cannot be written to either.
    """
    import tempfile

    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) <= _LONGEST_FOLDER:
        return
    if not os.access("/tmp", os.W_OK | os.X_OK):
        raise PreflightError(
            f"TMPDIR is {folder}, which is too long for the sockets of loader processes, and /tmp cannot be written; "
            f"set TMPDIR to a folder of at most {_LONGEST_FOLDER} characters"
        )
    tempfile.tempdir = "/tmp"


def unwinding(command: Callable[[], int]) -> int:
    """The exit code of a command which a SIGTERM ends by way of what removes half-made things.

    The command's own children end first, at once. Once it has come to its end, a SIGTERM ends this process as it is.
    """
    # The command line needs this module for other things, and starts faster without that one.
    import multiprocessing

    def end(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: a second is not to cut the unwinding short
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    # A child that is forked from here has nothing half made of its own.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        return command()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def left_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it does.

    A terminal sends Ctrl-C to both; the parent then ends this process with a SIGTERM, on which it can clean up.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
