"""Which checkpoint a path of the command line means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import committed, problem, read_manifest, told_whose
from dfmspec.record.progress import Progress, saved_in
from dfmspec.record.run_dir import RunDir
from dfmspec.spec.checkpoints import MANIFEST
from dfmspec.spec.iterations import iteration_folders, iteration_in


def locate(place: Path, report: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path means, with its manifest.

    It is the path itself, or the newest whole one of a folder or a run directory.

    Args:
        place: the path.
        report: where checkpoints that are passed over are told.

    Raises:
        CheckpointError: there is none, or it is not whole.
    """
    if iteration_in(place.name) is not None and (place / MANIFEST).exists():
        fault = problem(place, _known(place.parent))
        if fault:
            raise CheckpointError(f"checkpoint {place} is not whole: {fault}")
        return place, read_manifest(place)

    # A run that saves elsewhere says where.
    for folder in (place, saved_in(RunDir(place))):
        for found in committed(folder):
            fault = problem(found, _known(folder))
            if fault is None:
                return found, read_manifest(found)
            report(f"checkpoint {found} is passed over: {fault}")
    there = [place] if iteration_in(place.name) is not None else iteration_folders(place)
    raise CheckpointError(told_whose(there) or f"{place} has no whole checkpoint (iter_N with {MANIFEST})")


def _known(folder: Path) -> dict[int, str]:
    """What the run around a folder of checkpoints, if there is one, knows of them."""
    run = RunDir(folder.absolute().parent)
    if run.checkpoints != folder.absolute():
        return {}
    return Progress.of(run, folder).digests
