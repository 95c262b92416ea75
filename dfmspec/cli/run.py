"""dfmspec run: validate, plan, launch, watch, write down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dfmspec.cli.arguments import load_checked, one_file, require_valid, trainer_module
from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed
from dfmspec.errors import OK, InvalidSpec, PreflightError, UsageError
from dfmspec.targets import target_module

if TYPE_CHECKING:
    from dfmspec.plan.plan import Plan
    from dfmspec.read.resolve import Resolved
    from dfmspec.record.manifest import Manifest
    from dfmspec.record.run_dir import RunDir


class _Source(NamedTuple):
    """What is run, and what it was made of."""

    plan: Plan
    file: str | None
    """The spec; None: a bundle."""
    text: str | None
    """The text of the spec."""
    overrides: tuple[str, ...] = ()


_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC|PLAN_DIR [KEY=VALUE]...",
        help="A spec with overrides, or a folder of `plan -o`.",
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
_OutputDir = Annotated[
    str | None,
    typer.Option("--output-dir", help="Folder of the run directories, instead of run.output_dir."),
]


def run(
    words: _Words,
    dry_run: _DryRun = False,
    dataset_path: _DatasetPath = None,
    detach: _Detach = False,
    run_output: _OutputDir = None,
) -> None:
    """Train: check the spec, start the plan's commands, supervise them, and record the run.

    Progress goes to stderr, the run directory to stdout. The same command again continues an unfinished run.

    Exit code 0: the last iteration was reached and its checkpoint is whole. 1: findings, or training failed. 3: a stale
    plan. 4: something is missing on this machine. 5: the run is locked. 75: stopped by a signal and resumable.

    Example: dfmspec run spec.yaml train.train_iters=100
    """
    from dfmspec.record.run_dir import RunDir
    from dfmspec.run.request import Request
    from dfmspec.run.supervise import execute, talk_to_stderr

    # The plan: as it was saved, or compiled now.
    file, overrides = one_file(words)
    if Path(file).is_dir():
        source = _from_bundle(Path(file), overrides, dry_run=dry_run)
    else:
        resolved = _checked(file, overrides, dataset_path, dry_run=dry_run)
        source = _from_spec(file, overrides, resolved)
        if dry_run:
            _show(resolved, source.plan)
            return

    # What is started, and whether this machine can.
    plan = source.plan
    if run_output is not None:
        plan = dataclasses.replace(plan, run={**plan.run, "output_dir": run_output})
    _require_startable(plan, detach=detach)
    plan = _with_its_data(plan, is_saved=source.file is None)

    # The run itself, then its pictures.
    request = Request(plan, source.file, source.text, source.overrides, talk_to_stderr, detach)
    code, run_dir = execute(request)
    if code == OK and plan.run["num_samples"] and not detach:
        with suppress(KeyboardInterrupt):  # the run has succeeded
            _draw(RunDir(run_dir), plan.run["num_samples"])
    _conclude(RunDir(run_dir))
    raise typer.Exit(code)


def _from_bundle(folder: Path, overrides: Sequence[str], *, dry_run: bool) -> _Source:
    """The plan of a bundle, as it stands and as its guards hold.

    Raises:
        UsageError: overrides or --dry-run, which are for a spec.
        StalePlanError: its files, the code or the data are not those of the plan.
    """
    from dfmspec.run.bundle import check_files, read_bundle
    from dfmspec.run.guards import check_guards

    if overrides:
        raise UsageError("a plan is run exactly as it is; give overrides to `dfmspec plan` instead")
    plan = read_bundle(folder)
    if dry_run:
        raise UsageError(f"{folder} is a plan already; read {folder}/plan.json, or run it")
    check_guards(plan)  # first: other code may give other files
    check_files(plan, folder)
    return _Source(plan, file=None, text=None)


def _checked(file: str, overrides: Sequence[str], dataset_path: str | None, *, dry_run: bool) -> Resolved:
    """A spec's configuration, without errors.

    Raises:
        InvalidSpec: there are errors, accepted or not.
        UsageError: no dataset is named.
    """
    resolved, findings = load_checked(file, overrides, dataset_path, ("spec", "paths"), everything=True)
    require_valid(resolved, not_suppressed(findings))
    if target_module(resolved.spec.target).OWN:
        _refuse_accepted(findings)
    is_mock = resolved.values.get("data.source") == "mock"
    if resolved["dataset.path"] is None and not is_mock and not dry_run:
        raise UsageError("no dataset is named: give --dataset-path or dataset.path, or data.source=embedded")
    return resolved


def _from_spec(file: str, overrides: Sequence[str], resolved: Resolved) -> _Source:
    from dfmspec.plan.plan import make_plan

    documents = resolved.spec.documents
    text = documents[0].text if documents else None
    return _Source(make_plan(resolved), file, text, tuple(overrides))


def _show(resolved: Resolved, plan: Plan) -> None:
    from dfmspec.plan.describe import described

    typer.echo(described(resolved, plan))


def _require_startable(plan: Plan, *, detach: bool) -> None:
    """Refuse what cannot be started from here.

    Raises:
        PreflightError: the target runs elsewhere, or the machine has no GPU.
        UsageError: --detach, with a launcher whose processes end with this one.
    """
    from dfmspec.run.launch import launcher

    if not target_module(plan.target).OWN:
        raise PreflightError(
            f"target {plan.target} runs in its own checkout: "
            "write the plan with `dfmspec plan -o DIR`, and start DIR/node0.sh there"
        )
    kind = plan.launcher["kind"]
    if detach and not launcher(kind).OUTLIVES:
        raise UsageError(f"--detach: what launcher {kind} starts ends with this command; launcher slurm goes on")
    if kind == "local" and plan.gpus_per_node and not Path("/dev/nvidiactl").exists():
        raise PreflightError(
            "the plan is for CUDA and this machine has no NVIDIA driver; give cluster.device=cpu to try it on the CPU"
        )


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

    data = plan.config["data"]
    path = plan.located(plan.config["dataset"]["path"] or "")
    if data["source"] != "embedded" or Path(path).exists():
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


def _conclude(run: RunDir) -> None:
    """The verdict on stderr, the run directory on stdout."""
    from dfmspec.record.manifest import read_manifest
    from dfmspec.run.supervise import talk_to_stderr

    manifest = read_manifest(run)
    talk_to_stderr(f"{manifest.verdict}: {manifest.reason}")
    for line in _figures(manifest):
        talk_to_stderr(line)
    if manifest.verdict == "failed":
        for line in _where_to_look(run, manifest):
            talk_to_stderr(line)
    for artifact in manifest.artifacts:
        talk_to_stderr(f"drawn: {run}/{artifact}")
    typer.echo(str(run))


def _figures(manifest: Manifest) -> list[str]:
    metrics = manifest.metrics
    if metrics.final_loss is None or metrics.first_loss is None:
        return []
    loss = f"loss {metrics.first_loss:.3f} -> {metrics.final_loss:.3f}"
    if metrics.eval_loss is not None:
        loss += f", evaluation {metrics.eval_loss:.3f}"
    return [f"{loss}; {metrics.tokens_per_second:,.0f} tokens/s"]


def _where_to_look(run: RunDir, manifest: Manifest) -> list[str]:
    """After a failure: where its account is, and from where the run goes on."""
    lines = []
    if manifest.attempts:
        attempt = manifest.attempts[-1]
        failure = attempt.failure
        if failure and failure.traceback:
            rank = run.attempt(attempt.number).node(failure.node).rank(failure.rank)
            lines.append(f"full traceback: {rank.error}")
    lines.append(f"logs: {run.attempts}")
    if manifest.checkpoints:
        lines.append(f"the same command continues from iteration {manifest.checkpoints[-1].iteration}")
    return lines
