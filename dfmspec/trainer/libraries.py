"""Kernels of other libraries, used where they are installed (the extra `flash`) and were tried: on Hopper.

The versions are those whose inner functions we call; another one counts as not installed.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
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

_COMPILED = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dfmspec")
"""Where they keep what they compiled: their own choice is a folder that any user of this machine may have made before. Read when they are imported."""
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", os.path.join(_COMPILED, "flash-attn-4"))
os.environ.setdefault("QUACK_CACHE_DIR", os.path.join(_COMPILED, "quack-kernels"))


def installed(library: Library) -> bool:
    """Whether this very version is, with all that it needs."""
    try:
        return version(library.name) == library.version and import_module(library.module) is not None
    except (PackageNotFoundError, ImportError):
        return False


@cache
def usable(library: Library) -> bool:
    """Whether this process's GPU is a Hopper, and it is installed."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and installed(library)
