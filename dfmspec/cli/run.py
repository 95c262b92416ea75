"""dfmspec run: validate, plan, launch, watch, write down."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmspec.cli.arguments import load_checked, one_file, require_valid, trainer_module
from dfmspec.diagnostics import Diagnostic, Severity, shown
from dfmspec.errors import OK, InvalidSpec, PreflightError, UsageError
from dfmspec.targets import target_module

if TYPE_CHECKING:
    from dfmspec.plan.plan import Plan


def run(
    words: Annotated[
        list[str], typer.Argument(metavar="SPEC|PLAN_DIR [KEY=VALUE]...", help="A spec with overrides, or a folder of `plan -o`.", show_default=False)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="Show the plan and start nothing.")] = False,
    dataset_path: Annotated[str | None, typer.Option(help="Folder of the WebDataset, or a metadataset's .yaml, as the training script takes it.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="With launcher slurm: submit the job and return; the same command watches it again.")] = False,
    run_output: Annotated[str | None, typer.Option("--output-dir", help="Folder of the run directories, instead of run.output_dir.")] = None,
) -> None:
    """Train: check the spec, start the plan's commands, supervise them, and record the run.

    Progress goes to stderr, the run directory to stdout. The same command again continues an unfinished run.

    Exit code 0: the last iteration was reached and its checkpoint is whole. 1: findings, or training failed. 3: a stale
    plan. 4: something is missing on this machine. 5: the run is locked. 75: stopped by a signal and resumable.

    Example: dfmspec run spec.yaml train.train_iters=100
    """
    from dfmspec.plan.describe import described
    from dfmspec.plan.plan import make_plan
    from dfmspec.run.bundle import check_files, read_bundle
    from dfmspec.run.launch import launcher
    from dfmspec.run.supervise import Request, check_guards, execute, talk_to_stderr

    file, overrides = one_file(words)
    text: str | None = None
    if Path(file).is_dir():
        if overrides:
            raise UsageError("a plan is run exactly as it is; give overrides to `dfmspec plan` instead")
        plan = read_bundle(Path(file))
        if dry_run:
            raise UsageError(f"{file} is a plan already; read {file}/plan.json, or run it")
        check_files(plan, Path(file))
        check_guards(plan)
    else:
        resolved, findings = load_checked(file, overrides, dataset_path, ("spec", "paths"), everything=True)
        require_valid(resolved, shown(findings))
        if target_module(resolved.spec.target).OWN:
            _refuse_accepted(findings)
        if resolved["dataset.path"] is None and resolved.values.get("data.source") != "mock" and not dry_run:
            raise UsageError("no dataset is named: give --dataset-path or dataset.path, or data.source=embedded")
        plan = make_plan(resolved)
        if dry_run:
            typer.echo(described(resolved, plan))
            return
        text = resolved.spec.documents[0].text if resolved.spec.documents else None
    if not target_module(plan.target).OWN:
        raise PreflightError(
            f"target {plan.target} runs in its own checkout: write the plan with `dfmspec plan -o DIR`, and start DIR/node0.sh there"
        )
    if run_output is not None:
        plan = dataclasses.replace(plan, run={**plan.run, "output_dir": run_output})
    kind = plan.launcher["kind"]
    if detach and not launcher(kind).OUTLIVES:
        raise UsageError(f"--detach: what launcher {kind} starts ends with this command; launcher slurm goes on")
    if kind == "local" and plan.gpus_per_node and not Path("/dev/nvidiactl").exists():
        raise PreflightError("the plan is for CUDA and this machine has no NVIDIA driver; give cluster.device=cpu to try it on the CPU")
    plan = _prepared(plan, saved=Path(file).is_dir())
    code, run_dir = execute(Request(plan, None if Path(file).is_dir() else file, text, tuple(overrides), talk_to_stderr, detach))
    if code == OK and plan.run["num_samples"] and not detach:
        with suppress(KeyboardInterrupt):  # the run has succeeded
            _draw(run_dir, plan.run["num_samples"])
    _conclude(run_dir, code)
    raise typer.Exit(code)


def _refuse_accepted(findings: Sequence[Diagnostic]) -> None:
    """Errors that a comment accepts: every rank would find them in the plan's configuration, which has no comments.

    Raises:
        InvalidSpec: there are some.
    """
    codes = sorted({finding.code for finding in findings if finding.suppression is not None and finding.severity is Severity.ERROR})
    if codes:
        raise InvalidSpec(f"{', '.join(codes)} is accepted by a comment, but the trainer refuses it all the same; nothing was started")


def _prepared(plan: Plan, *, saved: bool) -> Plan:
    """With the embedded data drawn before anything is launched; what was drawn is what a `saved` plan guards, and any other guards from now on.

    Raises:
        StalePlanError: a saved plan was made on other data.
    """
    from dfmspec.run.supervise import check_guards, guards_now

    data, path = plan.config["data"], plan.located(plan.config["dataset"]["path"] or "")
    if data["source"] == "embedded" and not Path(path).exists():
        arguments = [path, "--resolution", str(data["resolution"]), "--num-samples", str(data["num_samples"]), "--seed", str(data["seed"])]
        if trainer_module("prepare", *arguments, quiet=True):
            raise PreflightError(f"the embedded dataset {path} could not be made; the lines above say why")
        if saved:
            check_guards(plan)
        else:
            plan = dataclasses.replace(plan, guards=guards_now(plan))
    return plan


def _draw(run_dir: Path, count: int) -> None:
    """Pictures from the final checkpoint, and the loss curve; their absence does not undo a training run."""
    from dfmspec.record.checkpoints import unused
    from dfmspec.record.manifest import read_manifest, write_manifest

    if read_manifest(run_dir).artifacts:
        return
    out = unused(run_dir / "samples")
    trainer_module("commands.sample", str(run_dir), "--out", str(out), "--num-samples", str(count), "--curve", quiet=True)
    manifest = read_manifest(run_dir)
    drawn = [out / name for name in ("grid.png", "loss.png")]  # the single pictures stand beside them
    manifest.artifacts = [str(path.relative_to(run_dir)) for path in drawn if path.exists()]
    write_manifest(run_dir, manifest)


def _conclude(run_dir: Path, code: int) -> None:
    """The verdict on stderr, the run directory on stdout."""
    from dfmspec.record.manifest import read_manifest
    from dfmspec.run.supervise import talk_to_stderr

    manifest = read_manifest(run_dir)
    metrics = manifest.metrics
    talk_to_stderr(f"{manifest.verdict}: {manifest.reason}")
    if metrics.final_loss is not None and metrics.first_loss is not None:
        evaluation = f", evaluation {metrics.eval_loss:.3f}" if metrics.eval_loss is not None else ""
        talk_to_stderr(f"loss {metrics.first_loss:.3f} -> {metrics.final_loss:.3f}{evaluation}; {metrics.tokens_per_second:,.0f} tokens/s")
    if manifest.verdict == "failed":
        attempt = manifest.attempts[-1] if manifest.attempts else None
        if attempt and attempt.failure and attempt.failure.traceback:
            talk_to_stderr(f"full traceback: {run_dir}/attempts/{attempt.number}/node{attempt.failure.node}/rank{attempt.failure.rank}/error.json")
        talk_to_stderr(f"logs: {run_dir}/attempts")
        if manifest.checkpoints:
            talk_to_stderr(f"the same command continues from iteration {manifest.checkpoints[-1].iteration}")
    for artifact in manifest.artifacts:
        talk_to_stderr(f"drawn: {run_dir}/{artifact}")
    typer.echo(run_dir)
