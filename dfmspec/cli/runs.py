"""dfmspec runs and dfmspec show: what ran, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmspec.cli.arguments import TEXT_OR_JSON, RunArgument, RunsFolder, TextOrJson, check_format
from dfmspec.errors import UsageError

if TYPE_CHECKING:
    from dfmspec.record.manifest import Attempt, Manifest, Metrics
    from dfmspec.record.run_dir import RunDir

_OutputDir = Annotated[
    Path,
    typer.Argument(help="Folder of the run directories."),
]


def runs(output_dir: _OutputDir = Path("runs"), format_: TextOrJson = "text") -> None:
    """List the runs, newest first: state, iterations, loss."""
    form = check_format(format_, TEXT_OR_JSON)
    if not output_dir.is_dir():
        raise UsageError(f"{output_dir} is not a folder; name the one that holds the run directories")
    found = _newest_first(output_dir)
    if form == "json":
        entries = [manifest.model_dump() | {"run_dir": str(path)} for path, manifest in found]
        typer.echo(json.dumps(entries, indent=2))
        return
    if not found:
        typer.echo(f"no runs in {output_dir}", err=True)
        return
    rows: list[tuple[str, ...]] = [("RUN", "STATE", "ITERATION", "LOSS", "ATTEMPTS", "CREATED")]
    for group, members in _grouped(found).items():
        if group is not None:
            rows.append((f"{group}:", _states(members), "", "", "", ""))
        indent = "" if group is None else "  "
        for run_dir, manifest in members:
            name, *rest = _row(run_dir, manifest)
            rows.append((indent + name, *rest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


_Found = list[tuple["RunDir", "Manifest"]]


def _grouped(found: _Found) -> dict[str | None, _Found]:
    """The runs by their groups, of which each stands where its newest run does; first those of none."""
    groups: dict[str | None, _Found] = {None: []}
    for run_dir, manifest in found:
        groups.setdefault(manifest.group, []).append((run_dir, manifest))
    return groups


def _states(members: _Found) -> str:
    """How the runs of a group stand: `3 succeeded, 1 failed`."""
    from collections import Counter

    from dfmspec.record.runs import state

    counts = Counter(state(run_dir, manifest) for run_dir, manifest in members)
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _newest_first(output_dir: Path) -> list[tuple[RunDir, Manifest]]:
    """The run directories of all experiments, each with its manifest."""
    from dfmspec.record.runs import runs_of

    found: list[tuple[RunDir, Manifest]] = []
    for experiment in sorted(output_dir.iterdir()):
        if experiment.is_dir():
            found += runs_of(experiment)
    found.sort(key=lambda entry: entry[1].created, reverse=True)
    return found


def _row(run_dir: RunDir, manifest: Manifest) -> tuple[str, str, str, str, str, str]:
    """A line of the table of runs."""
    from dfmspec.record.runs import reached, state

    iteration = reached(run_dir, manifest)
    loss = manifest.metrics.final_loss
    return (
        f"{manifest.name}/{manifest.run_id}",
        state(run_dir, manifest),
        "-" if iteration is None else str(iteration),
        "-" if loss is None else f"{loss:.3f}",
        str(len(manifest.attempts)),
        manifest.created,
    )


def show(
    run: RunArgument,
    output_dir: RunsFolder = Path("runs"),
    format_: TextOrJson = "text",
) -> None:
    """Show a run's manifest: what was asked, every attempt, the checkpoints, the verdict."""
    from dfmspec.record.manifest import read_manifest
    from dfmspec.record.runs import find_run

    form = check_format(format_, TEXT_OR_JSON)
    run_dir = find_run(run, output_dir)
    try:
        manifest = read_manifest(run_dir)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{run_dir}/manifest.json cannot be read: {reason}") from error
    if form == "json":
        typer.echo(json.dumps(manifest.model_dump(), indent=2))
        return
    lines = _heading(run_dir, manifest) + _metrics_lines(manifest.metrics)
    for attempt in manifest.attempts:
        lines += _attempt_lines(attempt)
    lines += [f"  checkpoint  {checkpoint.path}" for checkpoint in manifest.checkpoints]
    lines += [f"  drawn       {run_dir}/{artifact}" for artifact in manifest.artifacts]
    typer.echo("\n".join(lines))


def _heading(run_dir: RunDir, manifest: Manifest) -> list[str]:
    """Which run it is, how it stands, and what it was made of."""
    training = manifest.environment.get("training", {})
    versions = training.get("versions") or manifest.environment.get("packages", {})
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    spec_file = manifest.spec_file or "-"
    overrides = " ".join(manifest.overrides)
    return [
        f"{manifest.name}  {manifest.run_id}",
        f"  {_stands(run_dir, manifest)}",
        f"  directory   {run_dir}",
        f"  spec        {spec_file}  {overrides}".rstrip(),
        f"  plan        {manifest.plan_id}",
        f"  git         {_git(manifest.git)}",
        f"  packages    {packages}",
        *_code_lines(training.get("sources", [])),
    ]


def _code_lines(sources: list[dict[str, Any]]) -> list[str]:
    """The revisions of a script's code, where it was looked at."""
    told = [f"{source['name']} {source['revision'] or 'of another revision'}" for source in sources]
    return [f"  code        {', '.join(told)}"] if told else []


def _stands(run_dir: RunDir, manifest: Manifest) -> str:
    """How a run stands: its state, and why, or how far it is."""
    from dfmspec.record.runs import reached, state

    stands = state(run_dir, manifest)
    if manifest.verdict != "running":
        return f"{stands}: {manifest.reason}"
    iteration = reached(run_dir, manifest) or "-"
    advice = ""
    if stands == "unwatched":
        advice = "; nobody watches it: the same command goes on with it"
    return f"{stands}: iteration {iteration}{advice}"


def _git(state: dict[str, Any] | None) -> str:
    """The commit of the code, and whether it was changed since."""
    if state is None:
        return "-"
    changes = {True: " with changes", None: ", changes unknown"}
    if "patch" in state:
        changes[True] = f" with changes, kept in {state['patch']}"
    branch = state.get("branch")  # which earlier records do not have
    on = f" on {branch}" if branch else ""
    return str(state["commit"]) + on + changes.get(state["dirty"], "")


def _metrics_lines(metrics: Metrics) -> list[str]:
    """Loss and speed, once there are any."""
    if metrics.final_loss is None:
        return []
    evaluation = ""
    if metrics.eval_loss is not None:
        evaluation = f", evaluation {metrics.eval_loss:.4f}"
    padding = ""
    if metrics.padding is not None:
        padding = f", padding {metrics.padding:.0%}"
    seconds = f"{metrics.seconds_per_iteration:.3f} s an iteration"
    tokens = f"{metrics.tokens_per_second:,.0f} tokens/s"
    return [
        f"  loss        {metrics.first_loss:.4f} -> {metrics.final_loss:.4f}{evaluation}",
        f"  speed       {seconds}, {tokens}{padding}",
    ]


def _attempt_lines(attempt: Attempt) -> list[str]:
    """One attempt: when it ran, how far it came, how its processes ended."""
    if attempt.outcome == "running":
        return [f"  attempt {attempt.number}   {attempt.started}: running"]
    codes = ",".join(str(node.exit_code) for node in attempt.nodes)
    ended = attempt.ended or "?"
    iterations = f"iterations {attempt.from_iteration} to {attempt.to_iteration}"
    lines = [
        f"  attempt {attempt.number}   {attempt.started} to {ended}: {iterations}, {attempt.outcome} (exit {codes})",
    ]
    if attempt.start_seconds:
        total = sum(attempt.start_seconds.values())
        stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in attempt.start_seconds.items())
        lines.append(f"    start     {total:.1f} s: {stages}")
    if attempt.failure:
        failure = attempt.failure
        lines.append(f"    rank {failure.rank}: {failure.error_type}: {failure.message}")
    return lines
