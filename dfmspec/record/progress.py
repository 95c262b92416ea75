"""What a run has committed, by all that bears witness: its record, its events, the tracker, the checkpoints.

Before it goes on they must agree with one another and with its plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import TRACKER, iteration_of, read_manifest
from dfmspec.record.events import Event, read_events
from dfmspec.record.files import read_json
from dfmspec.record.run_dir import RunDir
from dfmspec.spec.digest import canonical, config_digest
from dfmspec.spec.iterations import folder_of
from dfmspec.spec.paths import PATH_KEYS, is_relative

_SHOWN = 3
"""Differences between two configurations that a message names."""


class Identity(NamedTuple):
    """Whose a checkpoint is."""

    config: Mapping[str, Any]
    """The configuration that it is trained with, as the target reads it."""
    plan_id: str | None
    """The plan's; None: torchrun was started by hand."""
    run_id: str | None = None
    """The run's that writes it; None likewise."""

    @property
    def config_digest(self) -> str:
        """sha256 of the configuration."""
        return config_digest(self.config)


class Progress(NamedTuple):
    """What a run has committed so far."""

    save: Path
    """Where it saves."""
    digests: dict[int, str]
    """The digest of each checkpoint's manifest, by iteration."""
    iteration: int
    """The highest iteration that was ever committed; 0: none was."""
    witness: str
    """The file that says so."""
    is_named: bool
    """Somebody has named this folder to go on from, whoever wrote what is there."""
    is_shared: bool
    """The folder is not the run's own: another run may have named it too."""
    anew: str
    """How this run is begun anew, for those who mean to."""

    @classmethod
    def of(cls, run: RunDir | None, save: Path, starts_from: Mapping[str, Any] | None = None) -> Progress:
        """The progress of a run.

        Args:
            run: its directory; None: torchrun was started by hand.
            save: where it saves.
            starts_from: where it is to start, as its record will have it, of a run that has none yet.
        """
        record: Mapping[str, Any] = {"starts_from": starts_from or {}}
        anew = "give checkpoint.save another folder"
        digests: dict[int, str] = {}
        witnesses = [(tracked_in(save), str(save / TRACKER))]
        if run is not None:
            if run.manifest.exists() or starts_from is not None:
                anew = "begin anew with run.resume=never"
            record = _record(run) or record
            if record.get("begins_anew") is True:
                witnesses = []
            recorded = _recorded(record)
            evented = _evented(run)
            digests = {at: digest for at, digest in (recorded | evented).items() if digest}
            witnesses += [(max(recorded, default=0), str(run.manifest)), (max(evented, default=0), str(run.events))]
        iteration, witness = max(witnesses)
        return cls(
            save=save,
            digests=digests,
            iteration=iteration,
            witness=witness,
            is_named=_names(record, save),
            is_shared=run is None or os.path.realpath(save.parent) != os.path.realpath(run.path),
            anew=anew,
        )


def _record(run: RunDir) -> dict[str, Any]:
    try:
        return read_json(run.manifest)
    except (OSError, ValueError):  # whoever opens the run looks at it
        return {}


def _recorded(record: Mapping[str, Any]) -> dict[int, str | None]:
    """Iteration -> digest of the checkpoints that a manifest names."""
    found: dict[int, str | None] = {}
    checkpoints = record.get("checkpoints")
    for checkpoint in checkpoints if isinstance(checkpoints, list) else []:
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get("iteration"), int):
            found[checkpoint["iteration"]] = checkpoint.get("manifest_digest")
    return found


def _evented(run: RunDir) -> dict[int, str | None]:
    """Iteration -> digest of the checkpoints that a run told of."""
    committed = read_events(run.events, kinds=["checkpoint"])
    return {event["iteration"]: event.get("manifest_digest") for event in committed}


def tracked_in(save: Path) -> int:
    """The iteration that the tracker of a folder names; 0: there is none, or it is damaged."""
    try:
        return int((save / TRACKER).read_bytes()[:20])
    except (OSError, ValueError):
        return 0


def _names(record: Mapping[str, Any], save: Path) -> bool:
    """Whether a run was told to start from the folder where it saves."""
    starts_from = record.get("starts_from")
    load = starts_from.get("load") if isinstance(starts_from, dict) else None
    if load is None:  # an earlier version wrote down the wish alone
        load = record.get("resumed_from")
    return isinstance(load, str) and os.path.realpath(load) == os.path.realpath(save)


def saved_in(run: RunDir) -> Path:
    """Where a run has saved last: in its own directory, unless its events name another folder."""
    told = read_events(run.events, kinds=["checkpoint"])
    if told and not run.checkpoints.exists():
        return Path(told[-1]["path"]).parent
    return run.checkpoints


def plan_id_of(run: RunDir) -> str | None:
    """The id of the plan that a run directory is of; None: it was made by no plan."""
    try:
        found = read_json(run.plan).get("plan_id")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def check_start(
    found: Path | None,
    progress: Progress,
    identity: Identity,
    report: Callable[[str], None],
) -> None:
    """See that a run goes on where it was, and with what is its own.

    Args:
        found: the checkpoint that it would start from, in the folder where it saves; None: it would begin anew.
        progress: what it has committed.
        identity: whose checkpoints are its own.
        report: where a difference that may be meant is told.

    Raises:
        CheckpointError: everything that was committed is gone, or the checkpoint is another plan's.
    """
    at = 0 if found is None else iteration_of(found)
    if found is None and progress.iteration > 0:
        raise CheckpointError(
            f"{progress.save} has no checkpoint, but iteration {progress.iteration} was committed, says "
            f"{progress.witness}; put the checkpoints back, or {progress.anew}"
        )
    if at < progress.iteration and not (progress.save / folder_of(progress.iteration)).exists():
        report(
            f"[WARNING] The checkpoint of iteration {progress.iteration}, which {progress.witness} names, is gone "
            f"from {progress.save}: training goes on from iteration {at}"
        )
    if found is not None:
        _check_own(found, progress, identity, report)


def committed_before(of_the_run: Sequence[Event], attempt: int) -> int:
    """The highest iteration that a run had committed when an attempt began, by its events; 0: none."""
    committed = 0
    for event in of_the_run:
        if event["type"] == "started" and event.get("attempt") == attempt:
            break
        if event["type"] == "checkpoint":
            committed = max(committed, event["iteration"])
    return committed


class Start(NamedTuple):
    """Where an attempt was to begin."""

    committed: int
    """The highest iteration that was committed before it; 0: none was."""
    named: str = ""
    """The place of a checkpoint that it was told to go on from; "": none."""
    is_exact: bool = False
    """It goes on from the newest, or not at all; otherwise damaged ones are passed over."""


def fault_of_start(start: Start, *, started: int, first: int | None) -> str | None:
    """What is wrong with where an attempt has begun, by what it has told; None: nothing.

    Args:
        start: where it was to begin.
        started: the iteration that it set out from.
        first: the first that it trained; None: none yet.
    """
    committed = start.committed
    if committed > 0 and started == 0:
        return f"it began anew, although iteration {committed} was committed before"
    if start.is_exact and started < committed:
        return f"it set out from iteration {started}, although {committed} was committed before"
    if start.named and committed == 0 and started == 0:
        return f"it started from random weights, and {start.named} was to be gone on from"
    if first is not None and first <= started:  # a later one: lines were lost
        return f"its first iteration was {first}, and {started + 1} was to be"
    return None


def _check_own(
    found: Path,
    progress: Progress,
    identity: Identity,
    report: Callable[[str], None],
) -> None:
    """See that a checkpoint was written by the plan that goes on from it.

    Raises:
        CheckpointError: it was written by another, and nobody has named it.
    """
    manifest = read_manifest(found)
    theirs = manifest.get("plan_id")
    is_known = theirs is not None and identity.plan_id is not None
    if is_known and theirs == identity.plan_id:
        return
    differences = _differences(manifest["config"], identity.config, with_data=progress.is_shared)
    if not is_known and not differences:
        return

    # What a person types is a wish; what two plans share is an accident.
    shown = ", ".join(differences[:_SHOWN]) or "the same configuration, under another name or environment"
    if len(differences) > _SHOWN:
        shown += f", and {len(differences) - _SHOWN} more"
    by_hand = identity.plan_id is None
    if progress.is_named or by_hand:
        report(f"[WARNING] Checkpoint {found} was written with other values: {shown}")
        return
    raise CheckpointError(
        f"checkpoint {found} is of another plan: {shown}; give checkpoint.save a folder of its own, "
        f"or go on from it with dfmspec run and run.resume={progress.save}"
    )


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], *, with_data: bool) -> list[str]:
    """`optimizer.lr is 0.0001 there and 0.0007 here`, of every value that two configurations do not share.

    Paths are of a machine; that of the data counts `with_data`.
    """
    ignored = PATH_KEYS - {"dataset.path"} if with_data else PATH_KEYS
    here = flat(json.loads(canonical(ours)))
    there = flat(theirs)
    found = []
    for key in sorted(here.keys() & there.keys() - ignored):
        # A relative path was relative to a folder that nobody knows any more.
        paths = (here[key], there[key]) if key in PATH_KEYS else ()
        if any(is_relative(path) for path in paths):
            continue
        if here[key] != there[key]:
            found.append(f"{key} is {there[key]!r} there and {here[key]!r} here")
    return found


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`section.field` -> value."""
    found: dict[str, Any] = {}
    for section, fields in config.items():
        if isinstance(fields, Mapping):
            found |= {f"{section}.{name}": value for name, value in fields.items()}
        else:
            found[section] = fields
    return found
