"""Which checkpoint a path of the command line means: one of dfmspec's, or of NVIDIA DFM's DiT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.errors import CheckpointError
from dfmspec.record import bridge_checkpoints
from dfmspec.record.bridge_config import trained_config
from dfmspec.record.checkpoints import iteration_of, problem, read_manifest, told_whose
from dfmspec.record.progress import Progress, saved_in
from dfmspec.record.run_dir import RunDir
from dfmspec.spec.checkpoints import MANIFEST, RUN_CONFIG
from dfmspec.spec.digest import config_digest
from dfmspec.spec.iterations import iteration_folders, iteration_in


class Located(NamedTuple):
    """A whole checkpoint."""

    path: Path
    """Its folder, `iter_N`."""
    iteration: int
    config: dict[str, Any]
    """What it was trained with; of DFM's, the sections that it says."""
    config_digest: str
    is_own: bool
    """Whether it is dfmspec's; otherwise it is NVIDIA DFM's, which has no averaged weights."""


def locate(place: Path, report: Callable[[str], None]) -> Located:
    """The checkpoint that a path means.

    It is the path itself, or the newest whole one of a folder or a run directory.

    Args:
        place: the path.
        report: where checkpoints that are passed over are told.

    Raises:
        CheckpointError: there is none, it is not whole, or it is of another network.
    """
    is_one = iteration_in(place.name) is not None
    there = [place] if is_one else iteration_folders(place)
    if not there:  # a run that saves elsewhere says where
        there = iteration_folders(saved_in(RunDir(place)))
    for checkpoint in there:
        if not _is_own(checkpoint) and not _is_dfms(checkpoint):
            continue
        fault = _problem(checkpoint)
        if fault is None:
            return _located(checkpoint)
        if is_one:
            raise CheckpointError(f"checkpoint {place} is not whole: {fault}")
        report(f"checkpoint {checkpoint} is passed over: {fault}")
    others = [checkpoint for checkpoint in there if not _is_dfms(checkpoint)]
    raise CheckpointError(
        told_whose(others) or f"{place} has no whole checkpoint (iter_N with {MANIFEST}, or DFM's with {RUN_CONFIG})"
    )


def _is_own(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).exists()


def _is_dfms(checkpoint: Path) -> bool:
    return (checkpoint / RUN_CONFIG).exists()


def _problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used."""
    if _is_own(checkpoint):
        return problem(checkpoint, _known(checkpoint.parent))
    return bridge_checkpoints.problem(checkpoint)


def _located(checkpoint: Path) -> Located:
    """A whole checkpoint, with what it says of itself."""
    if _is_own(checkpoint):
        manifest = read_manifest(checkpoint)
        return Located(checkpoint, manifest["iteration"], manifest["config"], manifest["config_digest"], True)
    config = trained_config(checkpoint)
    return Located(checkpoint, iteration_of(checkpoint), config, config_digest(config), False)


def _known(folder: Path) -> dict[int, str]:
    """What the run around a folder of checkpoints, if there is one, knows of them."""
    run = RunDir(folder.absolute().parent)
    if run.checkpoints != folder.absolute():
        return {}
    return Progress.of(run, folder).digests
