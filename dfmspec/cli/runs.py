"""dfmspec runs and dfmspec show: what ran, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmspec.cli.arguments import check_format
from dfmspec.errors import UsageError

if TYPE_CHECKING:
    from dfmspec.record.manifest import Manifest
    from dfmspec.record.run_dir import RunDir

_FORMATS = ("text", "json")


def runs(
    output_dir: Annotated[Path, typer.Argument(help="Folder of the run directories.")] = Path("runs"),
    format_: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """List the runs, newest first: state, iterations, loss."""
    from dfmspec.record.runs import reached, runs_of, state

    form = check_format(format_, _FORMATS)
    if not output_dir.is_dir():
        raise UsageError(f"{output_dir} is not a folder; name the one that holds the run directories")
    found = [entry for name in sorted(path for path in output_dir.iterdir() if path.is_dir()) for entry in runs_of(name)]
    found.sort(key=lambda entry: entry[1].created, reverse=True)
    if form == "json":
        typer.echo(json.dumps([manifest.model_dump() | {"run_dir": str(path)} for path, manifest in found], indent=2))
        return
    if not found:
        typer.echo(f"no runs in {output_dir}", err=True)
        return
    rows = [("RUN", "STATE", "ITERATION", "LOSS", "ATTEMPTS", "CREATED")]
    for run_dir, manifest in found:
        iteration, loss = reached(run_dir, manifest), manifest.metrics.final_loss
        rows.append(
            (f"{manifest.name}/{manifest.run_id}", state(run_dir, manifest), "-" if iteration is None else str(iteration),
             "-" if loss is None else f"{loss:.3f}", str(len(manifest.attempts)), manifest.created)
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _git(state: dict[str, Any] | None) -> str:
    if state is None:
        return "-"
    return str(state["commit"]) + {True: " with changes", None: ", changes unknown"}.get(state["dirty"], "")


def _stands(run_dir: RunDir, manifest: Manifest) -> str:
    from dfmspec.record.runs import reached, state

    stands = state(run_dir, manifest)
    if manifest.verdict != "running":
        return f"{stands}: {manifest.reason}"
    advice = "; nobody watches it: the same command goes on with it" if stands == "unwatched" else ""
    return f"{stands}: iteration {reached(run_dir, manifest) or '-'}{advice}"


def show(
    run: Annotated[str, typer.Argument(help="A run directory, a run id, or an experiment's name (its latest run).")],
    output_dir: Annotated[Path, typer.Option(help="Folder of the run directories.")] = Path("runs"),
    format_: Annotated[str, typer.Option("--format", help="text or json.")] = "text",
) -> None:
    """Show a run's manifest: what was asked, every attempt, the checkpoints, the verdict."""
    from dfmspec.record.manifest import read_manifest
    from dfmspec.record.runs import find_run

    form = check_format(format_, _FORMATS)
    run_dir = find_run(run, output_dir)
    try:
        manifest = read_manifest(run_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"{run_dir}/manifest.json cannot be read: {str(error).splitlines()[0]}") from error
    if form == "json":
        typer.echo(json.dumps(manifest.model_dump(), indent=2))
        return
    metrics, packages = manifest.metrics, manifest.environment.get("packages", {})
    lines = [
        f"{manifest.name}  {manifest.run_id}",
        f"  {_stands(run_dir, manifest)}",
        f"  directory   {run_dir}",
        f"  spec        {manifest.spec_file or '-'}  {' '.join(manifest.overrides)}".rstrip(),
        f"  plan        {manifest.plan_id}",
        f"  git         {_git(manifest.git)}",
        f"  packages    {', '.join(f'{name} {version}' for name, version in packages.items())}",
    ]
    if metrics.final_loss is not None:
        evaluation = "" if metrics.eval_loss is None else f", evaluation {metrics.eval_loss:.4f}"
        lines.append(f"  loss        {metrics.first_loss:.4f} -> {metrics.final_loss:.4f}{evaluation}")
        padding = "" if metrics.padding is None else f", padding {metrics.padding:.0%}"
        lines.append(f"  speed       {metrics.seconds_per_iteration:.3f} s an iteration, {metrics.tokens_per_second:,.0f} tokens/s{padding}")
    for attempt in manifest.attempts:
        if attempt.outcome == "running":
            lines.append(f"  attempt {attempt.number}   {attempt.started}: running")
            continue
        codes = ",".join(str(node.exit_code) for node in attempt.nodes)
        lines.append(
            f"  attempt {attempt.number}   {attempt.started} to {attempt.ended or '?'}: iterations {attempt.from_iteration} to "
            f"{attempt.to_iteration}, {attempt.outcome} (exit {codes})"
        )
        if attempt.start_seconds:
            stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in attempt.start_seconds.items())
            lines.append(f"    start     {sum(attempt.start_seconds.values()):.1f} s: {stages}")
        if attempt.failure:
            lines.append(f"    rank {attempt.failure.rank}: {attempt.failure.error_type}: {attempt.failure.message}")
    lines += [f"  checkpoint  {checkpoint.path}" for checkpoint in manifest.checkpoints]
    lines += [f"  drawn       {run_dir}/{artifact}" for artifact in manifest.artifacts]
    typer.echo("\n".join(lines))
