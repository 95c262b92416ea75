"""`iter_0000500`: how a checkpoint's folder is named by its iteration, written and read in this one way."""

from __future__ import annotations

import re
from pathlib import Path

_PREFIX = "iter_"
_NAME = r"iter_([0-9]+)"


LEFT_ASIDE = f"{_PREFIX}*.tmp-*"
"""What a killed save leaves."""


def folder_of(iteration: int) -> str:
    """The name of the folder of an iteration's checkpoint, as megatron-core has it."""
    return f"{_PREFIX}{iteration:07d}"


def iteration_in(name: str) -> int | None:
    """500 for `iter_0000500`; None for any other name, such as the `iter_0000500.tmp-...` that a killed save leaves."""
    match = re.fullmatch(_NAME, name)
    return int(match[1]) if match else None


def iteration_folders(folder: Path) -> list[Path]:
    """The checkpoints' folders of a folder, whole or not, the highest iteration first."""
    found = []
    for path in folder.glob(f"{_PREFIX}*"):
        iteration = iteration_in(path.name)
        if iteration is not None:
            found.append((iteration, path))
    return [path for _, path in sorted(found, reverse=True)]


def iterations(folder: Path) -> list[int]:
    """The iterations of a folder's checkpoints, whole or not, in order."""
    found = [iteration_in(path.name) for path in reversed(iteration_folders(folder))]
    return [iteration for iteration in found if iteration is not None]


def split_iteration(path: str) -> tuple[str, int | None]:
    """`ckpts/iter_5000/` as ("ckpts", 5000); any other path as (path, None)."""
    folder, _, last = path.rstrip("/").rpartition("/")
    iteration = iteration_in(last)
    if iteration is None:
        return path, None
    return folder or ".", iteration
