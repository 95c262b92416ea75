"""Kernels of other libraries, used where they are installed (the extra `flash`) and were tried: on Hopper.

The versions are those whose inner functions we call; another one counts as not installed.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

FLASH_ATTENTION = ("flash-attn-4", "4.0.0b36")
QUACK = ("quack-kernels", "0.6.5")


def installed(library: tuple[str, str]) -> bool:
    """Whether this very version is."""
    name, wanted = library
    try:
        return version(name) == wanted
    except PackageNotFoundError:
        return False


@cache
def usable(library: tuple[str, str]) -> bool:
    """Whether it is installed, and this process's GPU a Hopper."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and installed(library)
