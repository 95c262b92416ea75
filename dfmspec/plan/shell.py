"""Paths of a plan as a script writes them."""

from __future__ import annotations

import shlex

from dfmspec.spec.paths import SPEC_DIR

_STARTS = {f"{SPEC_DIR}/": '"$DFMSPEC_SPEC_DIR"/', "~/": '"$HOME"/'}
"""How a path of a plan may begin -> how a script writes that."""


def shell_path(path: str) -> str:
    """A path of a plan as a script writes it."""
    for start, written in _STARTS.items():
        if path.startswith(start):
            return written + shlex.quote(path.removeprefix(start))
    return shlex.quote(path)
