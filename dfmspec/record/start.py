"""Where a training starts: from which checkpoint, or afresh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import committed, find, iteration_of, problem
from dfmspec.record.progress import Identity, Progress, check_start
from dfmspec.spec.iterations import iteration_folders
from dfmspec.spec.paths import local_path
from dfmspec.spec.resume import Resume


class Asked(NamedTuple):
    """Where a training is to start, as its configuration says."""

    resume: Resume
    """run.resume"""
    load: Path
    """checkpoint.load, the folder to resume from."""
    step: int | None
    """checkpoint.ckpt_step, the iteration to resume from; None: the newest whole checkpoint."""


def start_of(asked: Asked, progress: Progress, identity: Identity, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that a training starts from; None: afresh.

    Args:
        asked: where it is to start.
        progress: what the run has committed, and where it saves.
        identity: whose checkpoints are the run's own.
        report: where checkpoints that are passed over are told.

    Raises:
        CheckpointError: what is asked for is not there or is another plan's, `never` meets checkpoints, what was
            committed is gone, or a later checkpoint is there.
    """
    found = _chosen(asked, progress, identity, report)
    _refuse_newer(progress, 0 if found is None else iteration_of(found))
    return found


def _refuse_newer(progress: Progress, iteration: int) -> None:
    """Refuse a start before the newest checkpoint, which would leave two histories in one folder.

    Raises:
        CheckpointError: there is a later one that could be used.
    """
    for path in committed(progress.save):
        newer = iteration_of(path)
        if newer > iteration and problem(path, progress.digests) is None:
            raise CheckpointError(
                f"{progress.save} has a checkpoint of iteration {newer}, "
                f"after the {iteration} to start from; give checkpoint.save another folder"
            )


def _chosen(asked: Asked, progress: Progress, identity: Identity, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that is asked for, whatever others there are; None: afresh."""
    resume, load, step = asked
    save = progress.save
    elsewhere = save != load  # somebody named a place to resume from

    # A run that began from there once may be this one: it goes on where it was.
    if elsewhere and resume.kind == "auto":
        continued = None
        if save.is_dir():
            continued = find(save, iteration=None, report=report, digests=progress.digests)
        if continued is not None or progress.iteration > 0:
            check_start(continued, progress, identity, report)
            return continued
    if resume.kind == "never":
        if iteration_folders(load):
            raise CheckpointError(f"{load} has checkpoints and run.resume is never; use another folder, or resume=auto")
        return None

    # From the place that run.resume or checkpoint.load names.
    folder = load
    if resume.folder is not None:
        folder = local_path(resume.folder).absolute()
    wanted = step if resume.iteration is None else resume.iteration
    digests = {} if folder != save else progress.digests
    found = None
    if folder.is_dir() or wanted is not None:
        found = find(folder, iteration=wanted, report=report, digests=digests)
    if resume.kind in ("auto", "require") and not elsewhere and wanted is None:
        check_start(found, progress, identity, report)
    if found is None and (elsewhere or resume.kind != "auto"):
        raise CheckpointError(f"{folder} has no checkpoint to resume from")
    return found
