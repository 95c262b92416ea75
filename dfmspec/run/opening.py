"""Opens the run directory of a plan: that of its unfinished run, or a new one.

Nothing is begun anew in silence: what a run has committed is there and its own, or the user is told what is not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfmspec.errors import CheckpointError, StalePlanError, UsageError
from dfmspec.files import write_aside
from dfmspec.plan.plan import Plan
from dfmspec.record import bridge_checkpoints
from dfmspec.record.checkpoints import iteration_of, newest_described
from dfmspec.record.manifest import Manifest, launch_host, now, read_manifest, write_manifest
from dfmspec.record.progress import Identity, Progress, check_start, plan_id_of, saved_in
from dfmspec.record.provenance import own_code
from dfmspec.record.run_dir import RunDir
from dfmspec.record.runs import broken_runs, latest_of, new_run_id, runs_of
from dfmspec.run.launch import launcher
from dfmspec.run.request import Launch
from dfmspec.run.sources import Sources, fingerprint_of
from dfmspec.spec.digest import config_digest, text_digest
from dfmspec.spec.iterations import iteration_folders
from dfmspec.spec.paths import local_path
from dfmspec.targets import CONFIG


def earlier(launch: Launch) -> tuple[RunDir, Manifest] | None:
    """The unfinished or finished run that a plan goes on with; None: it is to begin a new one.

    Raises:
        UsageError: there is nothing to resume from, or `never` meets checkpoints.
        StalePlanError: the run to continue was started on other data.
        CheckpointError: a run of the plan has lost its record.
    """
    named = launch.request.run
    if named is not None:
        manifest = read_manifest(named)
        if manifest.verdict != "succeeded":
            _check_same_data(named, manifest, launch.request.plan)
        return named, manifest
    resume = launch.resume
    of_the_plan = _of_the_plan(launch, launch.request.talk)
    _refuse_broken(launch, of_the_plan)

    # Go on with the newest run of this plan from this source; one that started elsewhere is not started there twice.
    for run, manifest in of_the_plan:
        if manifest.resumed_from != resume.source:
            continue
        is_over = resume.source is not None and manifest.verdict == "succeeded"
        if resume.kind == "never" or is_over:
            break
        _check_same_data(run, manifest, launch.request.plan)
        return run, manifest

    # Else a new one, where that is allowed.
    if resume.kind == "require":
        raise UsageError(f"run.resume is require, but {launch.folder} has no run of this plan")
    elsewhere = launch.checkpoints_elsewhere
    if resume.kind == "never" and elsewhere is not None and iteration_folders(elsewhere):
        raise UsageError(f"run.resume is never, but {elsewhere} has checkpoints; give checkpoint.save another folder")
    return None


def has_finished(launch: Launch, run: RunDir, manifest: Manifest) -> bool:
    """Whether a run has reached its last iteration, and still has what it committed.

    Raises:
        CheckpointError: its checkpoints are gone.
    """
    if manifest.verdict != "succeeded":
        return False
    if not is_credible(manifest):
        launch.request.talk(f"[WARNING] {run.manifest} says succeeded, and its last attempt did not finish: it goes on")
        return False
    check_progress(launch, run)
    return True


def is_credible(manifest: Manifest) -> bool:
    """Whether a record that says succeeded has an attempt that did."""
    return not manifest.attempts or manifest.attempts[-1].outcome == "finished"


def check_progress(launch: Launch, run: RunDir, starts_from: Mapping[str, Any] | None = None) -> None:
    """See that what a run has committed is there, and its plan's; what may be meant is told by the ranks.

    `starts_from`: of a run that has no record yet.

    Raises:
        CheckpointError: it is gone, or another plan's.
    """
    folder = launch.checkpoints(run)
    if not is_seen_here(launch) or launch.resume.kind == "never":  # or nothing to lose
        return
    progress = Progress.of(run, folder, starts_from)
    if launch.own:
        identity = Identity(launch.config, launch.plan_id)
        check_start(newest_described(folder), progress, identity, report=_unheard)
        return
    if launch.saves or starts_from:
        bridge_checkpoints.check_start(progress, launch.plan_id, starts_from or {})


def is_seen_here(launch: Launch) -> bool:
    """Whether this machine can be asked what a run has saved: its nodes may have a disk of their own.

    The ranks of dfmspec's own trainer look for themselves. Those of a script do not, so a folder that is here too is
    looked at.
    """
    elsewhere = launch.checkpoints_elsewhere
    is_here = not launcher(launch.request.plan.launcher["kind"]).RUNS_SCRIPTS
    return elsewhere is None or is_here or (not launch.own and elsewhere.is_dir())


def _unheard(line: str) -> None:
    """A line that somebody else tells."""


def _of_the_plan(launch: Launch, report: Callable[[str], None]) -> list[tuple[RunDir, Manifest]]:
    """The runs of a plan: first the one that was opened last, then by their names, the newest first.

    `report`: where copies that are left alone are told.
    """
    found = [(run, manifest) for run, manifest in runs_of(launch.folder) if manifest.plan_id == launch.plan_id]

    # A copy has the id of what it was copied from.
    names = {run.path.name for run, _ in found}
    own = []
    for run, manifest in found:
        if manifest.run_id != run.path.name and manifest.run_id in names:
            report(f"{run} is a copy of run {manifest.run_id} and is left alone")
        else:
            own.append((run, manifest))
    latest = latest_of(launch.folder)
    return sorted(own, key=lambda pair: latest is None or pair[0].path.resolve() != latest.path)


def _refuse_broken(launch: Launch, of_the_plan: Sequence[tuple[RunDir, Manifest]]) -> None:
    """See that no run that may be this plan's has lost its record.

    `of_the_plan`: those that have theirs.

    Raises:
        CheckpointError: one has.
    """
    if launch.resume.kind not in ("auto", "require"):
        return

    # Where one was opened after it, that one goes on.
    latest = latest_of(launch.folder)
    if latest is not None and latest.path in [run.path.resolve() for run, _ in of_the_plan]:
        return
    for run, fault in broken_runs(launch.folder):
        if plan_id_of(run) in (None, launch.plan_id):
            raise CheckpointError(
                f"the {run.manifest.name} of run {run} {fault}; put it back, or move the run away, "
                "or begin anew with run.resume=never"
            )


def new_run(launch: Launch) -> tuple[RunDir, Manifest]:
    """Make a run directory, with everything in it that was asked and compiled."""
    request = launch.request
    plan = request.plan
    starts_from = _start_elsewhere(launch)
    run_id = new_run_id(plan)
    run = RunDir(launch.folder / run_id)
    sources = Sources.of(request)
    check_progress(launch, run, starts_from)
    _check_something_to_train(launch, starts_from)
    _tell_of_another(launch)

    # What was asked, and what it was compiled to.
    run.path.mkdir()
    if request.spec_text is not None:
        write_aside(run.spec, request.spec_text)
    write_aside(run.plan, launch.plan_text(run))
    write_aside(run.path / CONFIG, launch.config_text(starts_from))
    sources.keep_patch(run)

    # The record.
    manifest = Manifest(
        run_id=run_id,
        name=plan.name,
        group=plan.run.get("group"),  # which earlier plans do not have
        plan_id=launch.plan_id,
        spec_file=request.spec_file,
        spec_digest=None if request.spec_text is None else text_digest(request.spec_text),
        config_digest=config_digest(launch.config_of(starts_from)),
        overrides=list(request.overrides),
        guards=dict(plan.guards),
        resumed_from=launch.resume.source,
        begins_anew=launch.resume.kind == "never",
        starts_from=starts_from,
        created=now(),
        git=sources.git,
        code=own_code(),
        data=fingerprint_of(launch),
        environment=launch_host(),
    )
    write_manifest(run, manifest)
    return run, manifest


def _start_elsewhere(launch: Launch) -> dict[str, Any]:
    """The keys of section `checkpoint` by which a new run starts where run.resume says."""
    resume = launch.resume
    if resume.iteration is not None:
        return {"load": _folder_with(resume.iteration, launch), "ckpt_step": resume.iteration}
    if resume.folder is not None:
        named = RunDir(local_path(resume.folder))
        folder = saved_in(named) if named.manifest.exists() else named.path  # a run directory will do
        return {"load": os.path.realpath(folder)}  # `latest` leads elsewhere once this run is opened
    return {}


def _check_something_to_train(launch: Launch, starts_from: Mapping[str, Any]) -> None:
    """See that the iteration that a new run sets out from is not its last already.

    Raises:
        UsageError: it is.
    """
    if not starts_from:
        return
    iteration = starts_from.get("ckpt_step")
    if iteration is None:
        folder = Path(starts_from["load"])
        if launch.own:
            newest = newest_described(folder)
            iteration = 0 if newest is None else iteration_of(newest)
        else:
            iteration = bridge_checkpoints.tracked(folder)
    last = launch.train_iters
    if iteration >= last:
        raise UsageError(
            f"run.resume sets out from iteration {iteration}, and train.train_iters is {last}: nothing would be "
            "trained; raise train.train_iters"
        )


def _folder_with(iteration: int, launch: Launch) -> str:
    """The checkpoint folder of the newest run of this plan that has an iteration.

    By the disk: also where nobody lived to write it down.
    """
    for run, _ in _of_the_plan(launch, _unheard):
        saved = launch.checkpoints(run)
        if any(iteration_of(path) == iteration for path in launch.judge.committed(saved)):
            return str(saved)
    raise UsageError(
        f"run.resume is {iteration}, but no run of this plan in {launch.folder} has a checkpoint of that iteration"
    )


def _tell_of_another(launch: Launch) -> None:
    """A new run of a name that has an unfinished one: a change of the spec, however small, has made it another.

    By the disk: also where nobody lived to write it down.
    """
    if launch.resume.kind != "auto":
        return
    for run, manifest in runs_of(launch.folder):
        if manifest.plan_id == launch.plan_id:
            continue
        saved = launch.judge.committed(saved_in(run))
        if manifest.verdict != "succeeded" and saved:
            iteration = iteration_of(saved[0])
            launch.request.talk(
                f"A new run: {run}, at iteration {iteration}, has another plan "
                f"(dfmspec plan --diff {run} tells what differs); run.resume={run} goes on from there"
            )
            return


def _check_same_data(run: RunDir, manifest: Manifest, plan: Plan) -> None:
    before = manifest.guards.get("dataset")
    is_unfinished = manifest.verdict != "succeeded"
    if is_unfinished and before is not None and before != plan.guards.get("dataset"):
        raise StalePlanError(
            f"run {run.path} cannot go on: its dataset's metadata has changed since it was started; "
            "put it back, or start anew with run.resume=never"
        )
