"""dfmspec run: validate, plan, launch, watch, write down."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dfmspec.cli.arguments import (
    CellOption,
    ProfileOption,
    cells_checked,
    load_checked,
    named_folder,
    of_cell,
    one_file,
    require_valid,
    trainer_module,
)
from dfmspec.cli.voice import detail, is_quiet
from dfmspec.colours import GREEN, RED, YELLOW, painted
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.errors import (
    FINDINGS,
    INTERNAL,
    LOCKED,
    OK,
    PREFLIGHT,
    RESUMABLE,
    STALE,
    USAGE,
    CheckpointError,
    DfmspecError,
    InvalidSpec,
    PreflightError,
    UsageError,
)
from dfmspec.targets import CONFIG, target_module

if TYPE_CHECKING:
    from dfmspec.plan.plan import Plan
    from dfmspec.read.resolve import Resolved
    from dfmspec.record.manifest import Manifest
    from dfmspec.record.run_dir import RunDir
    from dfmspec.run.preflight import Preflight


class PlanSource(NamedTuple):
    """What is run, and what it was made of."""

    plan: Plan
    file: str | None
    """The spec; None: nobody knows."""
    text: str | None
    """The text of the spec."""
    overrides: tuple[str, ...] = ()
    run: RunDir | None = None
    """The run that goes on; None: the plan's, or a new one."""
    is_saved: bool = False
    """The plan was made before, and is run as its guards hold."""


_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC|PLAN_DIR|RUN_DIR [KEY=VALUE]...",
        help="A spec with overrides, a folder of `plan -o`, or the directory of a run that goes on.",
        show_default=False,
    ),
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", "-n", help="Show the plan and start nothing."),
]
_DatasetPath = Annotated[
    str | None,
    typer.Option(help="Folder of the WebDataset, or a metadataset's .yaml, as the training script takes it."),
]
_Detach = Annotated[
    bool,
    typer.Option(
        "--detach",
        help="With launcher slurm: submit the job and return; the same command watches it again.",
    ),
]
_Preflight = Annotated[
    str,
    typer.Option(help="What is looked at before anything starts: quick (packages, revisions, GPUs), or off."),
]
_AllowRevision = Annotated[
    bool,
    typer.Option(
        "--allow-revision",
        help="Run another revision of NVIDIA DFM than the spec was checked by; the run writes down which.",
    ),
]
_KeepGoing = Annotated[
    bool,
    typer.Option("--keep-going", help="Of a matrix: go on with the next cell where one fails."),
]
_OutputDir = Annotated[
    str | None,
    typer.Option("--output-dir", help="Folder of the run directories, instead of run.output_dir."),
]


def run(
    words: _Words,
    dry_run: _DryRun = False,
    dataset_path: _DatasetPath = None,
    profile: ProfileOption = None,
    detach: _Detach = False,
    run_output: _OutputDir = None,
    preflight: _Preflight = "quick",
    allow_revision: _AllowRevision = False,
    cell: CellOption = None,
    keep_going: _KeepGoing = False,
) -> None:
    """Check, start, supervise and record a run.

    Progress goes to stderr, the run directory to stdout. The same command again continues an unfinished run.

    Words behind -- are torchrun's: dfmspec run spec.yaml -- --max-restarts=2

    Of a spec with a matrix, all cells one after the other, each a run of its own; the exit code is that of the worst.

    Exit code 0: the last iteration was reached and its checkpoint is whole. 1: findings, or training failed. 3: a stale
    plan. 4: something is missing on this machine. 5: the run is locked. 75: stopped by a signal and resumable.

    Example: dfmspec run spec.yaml train.train_iters=100
    """
    from dfmspec.run.preflight import LEVELS, Preflight

    # The plans: as one was saved, or compiled now.
    file, overrides = one_file(words, profile)
    looked_at = Preflight(_level(preflight, LEVELS), allow_revision)
    if not Path(file).exists() and file != "-" and not file.endswith((".yaml", ".yml")):
        file = str(named_folder(Path(file), "a spec, a bundle, a run directory"))
    if Path(file).is_dir():
        if cell is not None:
            raise UsageError("--cell is for a spec; a bundle or a run is of one cell already")
        sources = [_from_folder(Path(file), overrides, run_output, dry_run=dry_run)]
    else:
        checked = _checked(file, overrides, dataset_path, cell, dry_run=dry_run)
        sources = [_from_spec(file, resolved) for resolved in checked]
        if dry_run:
            _show(checked, [source.plan for source in sources])
            return

    # One after the other; what a signal stops is to end all of it.
    worst = OK
    for number, source in enumerate(sources, 1):
        if len(sources) > 1:
            _tell_of_cell(source, number, len(sources))
        code = _run_one(source, looked_at, run_output, detach=detach, keep_going=keep_going)
        worst = max(worst, code, key=_severity)
        was_stopped = code == RESUMABLE or code > _SIGNAL
        if was_stopped or (code != OK and not keep_going):
            _tell_of_rest(len(sources) - number)
            break
    raise typer.Exit(worst)


_SIGNAL = 128
"""Above it, an exit code is of a signal."""
_SEVERITY = (OK, RESUMABLE, LOCKED, PREFLIGHT, STALE, USAGE, FINDINGS, INTERNAL)
"""Exit codes, the worst last; only that of a signal is worse."""


def _severity(code: int) -> int:
    return _SEVERITY.index(code) if code in _SEVERITY else len(_SEVERITY)


def _tell_of_cell(source: PlanSource, number: int, count: int) -> None:
    _talk(f"Cell {number} of {count}: {source.plan.name}")


def _tell_of_rest(count: int) -> None:
    if count:
        cells = "1 cell was" if count == 1 else f"{count} cells were"
        typer.echo(f"{cells} not started; the same command starts over with what is left of the matrix", err=True)


def _run_one(
    source: PlanSource, looked_at: Preflight, run_output: str | None, *, detach: bool, keep_going: bool
) -> int:
    """Run one plan; the exit code. With --keep-going, an error that is told is one of its own.

    Raises:
        DfmspecError: it cannot be started.
    """
    try:
        code, _ = started(source, looked_at, run_output, detach=detach)
        return code
    except DfmspecError as error:
        if not keep_going or error.exit_code == INTERNAL:
            raise
        typer.echo(f"error: {error}", err=True)
        return error.exit_code


def started(source: PlanSource, looked_at: Preflight, run_output: str | None, *, detach: bool) -> tuple[int, Path]:
    """Run one plan: what is started, and whether this machine can; the run, and its pictures.

    Returns:
        The exit code, and the run directory.
    """
    from dfmspec.record.run_dir import RunDir
    from dfmspec.run.preflight import look_here
    from dfmspec.run.request import Request
    from dfmspec.run.supervise import execute

    # What is started, and whether this machine can.
    plan = source.plan
    if run_output is not None:
        plan = dataclasses.replace(plan, run={**plan.run, "output_dir": run_output})
    if source.is_saved or source.run is not None:
        require_allowed(plan, source.file)
    _require_startable(plan, detach=detach)
    is_here = plan.launcher["kind"] == "local"
    found = look_here(plan, looked_at) if is_here else {}
    plan = _with_its_data(plan, is_saved=source.is_saved)

    for node in range(min(plan.nnodes, _SHOWN_NODES)):
        detail(f"node {node} runs: {shlex.join(plan.argv(node))}")

    # The run itself, then its pictures.
    request = Request(plan, source.file, source.text, source.overrides, _talk, detach, source.run, looked_at, found)
    code, run_dir = execute(request)
    is_own = target_module(plan.target).OWN
    if code == OK and plan.run["num_samples"] and is_own and not detach:
        with suppress(KeyboardInterrupt):  # the run has succeeded
            _draw(RunDir(run_dir), plan.run["num_samples"])
    _conclude(RunDir(run_dir), own=is_own)
    return code, run_dir


_SHOWN_NODES = 4
"""Of how many nodes -v shows the command."""


def require_allowed(plan: Plan, spec_file: str | None) -> None:
    """Refuse what the site's policy forbids of a plan that was made elsewhere, or before there was one.

    Raises:
        InvalidSpec: it does; what, is told on stderr.
    """
    from dfmspec.check.policy import plan_findings

    file = spec_file or plan.name
    found = plan_findings(plan.target, plan.as_values(), file)
    errors = [finding for finding in found if finding.severity is Severity.ERROR]
    if errors:
        from dfmspec.check.report.text import report

        typer.echo(report(errors, {}, stream=sys.stderr), err=True)
        raise InvalidSpec(f"the plan of {file} is not allowed here; nothing was started")


def _talk(line: str) -> None:
    """Progress, which -q leaves out, but for warnings."""
    from dfmspec.run.supervise import talk_to_stderr

    if not is_quiet() or line.startswith("[WARNING]"):
        talk_to_stderr(line)


def _level(name: str, known: Sequence[str]) -> str:
    """How much is looked at.

    Raises:
        UsageError: it is not known.
    """
    if name not in known:
        raise UsageError(f"--preflight {name}: one of {', '.join(known)}")
    return name


def _from_folder(folder: Path, overrides: Sequence[str], output_dir: str | None, *, dry_run: bool) -> PlanSource:
    """The plan of a folder: of a run that goes on, or of a bundle."""
    from dfmspec.record.run_dir import RunDir

    run = RunDir(folder.resolve())
    if not run.manifest.exists() and not _was_a_run(run):
        return _from_bundle(folder, overrides, dry_run=dry_run)
    if overrides or output_dir is not None or dry_run:
        raise UsageError(
            f"{folder} is a run, which goes on exactly as it is; for other values, give run.resume={folder} "
            "beside the spec"
        )
    return _from_run(run)


def _was_a_run(run: RunDir) -> bool:
    """Whether a folder is of a run that has lost its record."""
    return run.plan.exists() and (run.events.exists() or run.attempts.exists())


def _from_run(run: RunDir) -> PlanSource:
    """The plan of a run, as its guards hold.

    Raises:
        CheckpointError: its record is gone, damaged, or another plan's.
        StalePlanError: its plan was edited; or the code or the data are no longer those of the plan.
    """
    from dfmspec.record.manifest import read_manifest
    from dfmspec.run.bundle import read_plan
    from dfmspec.run.guards import check_guards

    try:
        manifest = read_manifest(run)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(
            f"the {run.manifest.name} of run {run} cannot be read ({first_line}); put it back, "
            "or begin anew from the spec"
        ) from error
    plan = dataclasses.replace(read_plan(run.plan), guards=manifest.guards)
    if plan.recorded_id != manifest.plan_id:
        raise CheckpointError(f"{run.plan} is not the plan that {run.manifest} names; put it back")
    if manifest.verdict != "succeeded":
        check_guards(plan)
    return PlanSource(
        plan, manifest.spec_file, None, tuple(manifest.overrides), run, is_saved=manifest.spec_file is None
    )


def _from_bundle(folder: Path, overrides: Sequence[str], *, dry_run: bool) -> PlanSource:
    """The plan of a bundle, as it stands and as its guards hold.

    Raises:
        UsageError: overrides or --dry-run, which are for a spec.
        StalePlanError: its files, the code or the data are not those of the plan.
    """
    from dfmspec.run.bundle import check_files, read_bundle, read_source
    from dfmspec.run.guards import check_guards

    if overrides:
        raise UsageError("a plan is run exactly as it is; give overrides to `dfmspec plan` instead")
    plan = read_bundle(folder)
    if dry_run:
        raise UsageError(f"{folder} is a plan already; read {folder}/plan.json, or run it")
    check_guards(plan)  # first: other code may give other files
    check_files(plan, folder)
    _tell_of_config(plan, folder / CONFIG)
    source = read_source(folder, plan)
    if source is None:
        return PlanSource(plan, file=None, text=None, is_saved=True)
    return PlanSource(plan, source.spec_file, source.spec_text, source.overrides, is_saved=True)


def _tell_of_config(plan: Plan, file: Path) -> None:
    """The warnings that a saved configuration has, which no rank tells."""
    if target_module(plan.target).OWN and file.is_file():
        require_valid(load_checked(str(file), (), None, ("spec",), policy=False))  # which is asked of the plan


def _checked(
    file: str, overrides: Sequence[str], dataset_path: str | None, cell: str | None, *, dry_run: bool
) -> list[Resolved]:
    """A spec's configuration, without errors; of one with a matrix, that of the cell, or those of all.

    Raises:
        InvalidSpec: there are errors, accepted or not.
        UsageError: no dataset is named, or no such cell.
    """
    levels = ("spec", "paths", "run")
    whole = load_checked(file, overrides, dataset_path, levels, everything=True)
    if cell is None:
        found = cells_checked(whole, overrides, dataset_path, levels, everything=True)
    else:
        found = [of_cell(whole, cell, overrides, dataset_path, levels, everything=True)]
    require_valid(*found)
    for resolved, findings in found:
        if target_module(resolved.spec.target).OWN:
            _refuse_accepted(findings)
        is_mock = resolved.values.get("data.source") == "mock"
        if resolved["dataset.path"] is None and not is_mock and not dry_run:
            trial = "embedded" if target_module(resolved.spec.target).OWN else "mock"
            raise UsageError(f"no dataset is named: give --dataset-path or dataset.path, or data.source={trial}")
    return [resolved for resolved, _ in found]


def _from_spec(file: str, resolved: Resolved) -> PlanSource:
    from dfmspec.plan.plan import make_plan
    from dfmspec.run.bundle import Source

    source = Source.of(resolved)
    return PlanSource(make_plan(resolved), file, source.spec_text, source.overrides)


def _show(checked: Sequence[Resolved], plans: Sequence[Plan]) -> None:
    if len(plans) > 1:
        from dfmspec.cli.plan import cells_shown

        named = [resolved.spec.cell.name for resolved in checked if resolved.spec.cell is not None]
        typer.echo(cells_shown(dict(zip(named, plans, strict=True))))
        return
    from dfmspec.plan.describe import described

    typer.echo(described(checked[0], plans[0]))


def _require_startable(plan: Plan, *, detach: bool) -> None:
    """Refuse what cannot be started from here.

    Raises:
        UsageError: --detach, with a launcher whose processes end with this one.
    """
    from dfmspec.run.launch import launcher

    kind = plan.launcher["kind"]
    if detach and not launcher(kind).OUTLIVES:
        raise UsageError(f"--detach: what launcher {kind} starts ends with this command; launcher slurm goes on")


def _refuse_accepted(findings: Sequence[Diagnostic]) -> None:
    """Errors that a comment accepts: every rank would find them in the plan's configuration, which has no comments.

    Raises:
        InvalidSpec: there are some.
    """
    accepted = [finding for finding in findings if finding.suppression is not None]
    codes = {finding.code for finding in accepted if finding.severity is Severity.ERROR}
    if codes:
        listed = ", ".join(sorted(codes))
        raise InvalidSpec(
            f"{listed} is accepted by a comment, but the trainer refuses it all the same; nothing was started"
        )


def _with_its_data(plan: Plan, *, is_saved: bool) -> Plan:
    """The plan, with the embedded data drawn before anything is launched.

    What was drawn is what a saved plan guards, and any other guards from now on.

    Raises:
        StalePlanError: a saved plan was made on other data.
    """
    from dfmspec.run.guards import check_guards, guards_now

    data = plan.config.get("data", {})  # which is dfmspec's own section
    if data.get("source") != "embedded":
        return plan
    path = plan.located(plan.config["dataset"]["path"] or "")
    if Path(path).exists():
        return plan
    arguments = [path]
    for name in ("resolution", "num_samples", "seed"):
        flag = name.replace("_", "-")
        arguments += [f"--{flag}", str(data[name])]
    code = trainer_module("prepare", *arguments, quiet=True)
    if code != OK:
        raise PreflightError(f"the embedded dataset {path} could not be made; the lines above say why")
    if is_saved:
        check_guards(plan)
        return plan
    return dataclasses.replace(plan, guards=guards_now(plan))


def _draw(run: RunDir, count: int) -> None:
    """Pictures from the final checkpoint, and the loss curve; their absence does not undo a training run."""
    from dfmspec.record.checkpoints import unused
    from dfmspec.record.manifest import read_manifest, write_manifest

    if read_manifest(run).artifacts:
        return
    out = unused(run.samples)
    arguments = [str(run), "--out", str(out), "--num-samples", str(count), "--curve"]
    trainer_module("commands.sample", *arguments, quiet=True)

    # The grid and the curve are told; the single pictures stand beside them.
    manifest = read_manifest(run)
    drawn = [out / name for name in ("grid.png", "loss.png")]
    manifest.artifacts = [str(path.relative_to(run.path)) for path in drawn if path.exists()]
    write_manifest(run, manifest)


def _conclude(run: RunDir, *, own: bool) -> None:
    """The verdict on stderr, the run directory on stdout."""
    from dfmspec.record.manifest import read_manifest
    from dfmspec.run.supervise import talk_to_stderr

    manifest = read_manifest(run)
    say = _talk if manifest.verdict == "succeeded" else talk_to_stderr
    colour = {"succeeded": GREEN, "failed": RED}.get(manifest.verdict, YELLOW)
    say(f"{painted(manifest.verdict, colour, sys.stderr)}: {manifest.reason}")
    for line in _figures(manifest):
        say(line)
    if manifest.verdict == "failed":
        for line in _where_to_look(run, manifest, own=own):
            talk_to_stderr(line)
    for artifact in manifest.artifacts:
        _talk(f"drawn: {run}/{artifact}")
    typer.echo(str(run))


def _figures(manifest: Manifest) -> list[str]:
    metrics = manifest.metrics
    if metrics.final_loss is None or metrics.first_loss is None:
        return []
    loss = f"loss {metrics.first_loss:.3f} -> {metrics.final_loss:.3f}"
    if metrics.eval_loss is not None:
        loss += f", evaluation {metrics.eval_loss:.3f}"
    return [f"{loss}; {metrics.tokens_per_second:,.0f} tokens/s"]


def _where_to_look(run: RunDir, manifest: Manifest, *, own: bool) -> list[str]:
    """After a failure: where its account is, and from where the run goes on."""
    lines = []
    if manifest.attempts:
        attempt = manifest.attempts[-1]
        failure = attempt.failure
        if failure and failure.traceback:
            rank = run.attempt(attempt.number).node(failure.node).rank(failure.rank)
            lines.append(f"full traceback: {rank.error}")
    lines.append(f"logs: {run.attempts}")
    lines += _goes_on(manifest, own=own)
    return lines


def _goes_on(manifest: Manifest, *, own: bool) -> list[str]:
    """From where a failed run goes on, and how: a script does not pass over what is damaged."""
    from dfmspec.record.bridge_checkpoints import problem

    for found in reversed(manifest.checkpoints):
        if not own and problem(Path(found.path)) is not None:
            continue
        if found is manifest.checkpoints[-1]:
            return [f"the same command continues from iteration {found.iteration}"]
        return [f"run.resume={found.iteration} goes on from iteration {found.iteration}"]
    return []
