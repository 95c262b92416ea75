"""Kernels of other libraries, used where they are installed (the extra `flash`) and were tried: on Hopper.

The versions are those whose inner functions we call; another one counts as not installed.
"""

from __future__ import annotations

import fcntl
import os
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch


class Library(NamedTuple):
    """A library of one version."""

    name: str
    version: str
    module: str
    """What we import of it."""


FLASH_ATTENTION = Library("flash-attn-4", "4.0.0b36", "flash_attn.cute.interface")
QUACK = Library("quack-kernels", "0.6.5", "quack.gemm_interface")


def installed(library: Library) -> bool:
    """Whether this very version is installed, with all that it needs."""
    try:
        return version(library.name) == library.version and import_module(library.module) is not None
    except (PackageNotFoundError, ImportError):
        return False


@cache
def usable(library: Library) -> bool:
    """Whether this process's GPU is a Hopper, and the library is installed."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    return installed(library)


def kept_in(library: Library) -> Path | None:
    """A folder of this user's alone for what a library compiles.

    None where none can be made, or files there cannot be locked.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(caches) / "dfmspec" / library.name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError:
        return None
    return folder
