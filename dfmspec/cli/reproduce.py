"""dfmspec reproduce: a run made again from its record, and how the two compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmspec.cli.arguments import RunArgument, record_of
from dfmspec.cli.run import PlanSource, require_allowed, started
from dfmspec.colours import GREEN, RED, YELLOW, painted
from dfmspec.errors import FINDINGS, OK

if TYPE_CHECKING:
    from dfmspec.run.matching import Match

_RunsDir = Annotated[
    Path,
    typer.Option("--runs", help="Folder in which the run is looked for."),
]
_OutputDir = Annotated[
    str | None,
    typer.Option("--output-dir", help="Folder of the new run's directory; by itself, that of the first run."),
]
_DatasetPath = Annotated[
    str | None,
    typer.Option(help="Where the data are here; by itself, where they were."),
]
_DryRun = Annotated[
    bool,
    typer.Option("--dry-run", "-n", help="Tell what matches and what does not, and start nothing."),
]
_Exact = Annotated[
    bool,
    typer.Option("--exact", help="Exit code 1 unless all losses are the same to the last bit."),
]


def reproduce(
    run: RunArgument,
    runs: _RunsDir = Path("runs"),
    output_dir: _OutputDir = None,
    dataset_path: _DatasetPath = None,
    dry_run: _DryRun = False,
    exact: _Exact = False,
) -> None:
    """Run the plan of a record again, beside the first run, and compare the losses.

    First it tells what of then is here: code, versions, commit, data, image, GPUs. What is not, is not brought here.

    Exit code 0: it ran. 1: it failed, or with --exact some loss differs. Others as of dfmspec run.

    Example: dfmspec reproduce butterfly_tiny_cpu --exact
    """
    from dfmspec.record.run_dir import RunDir
    from dfmspec.record.runs import find_run
    from dfmspec.run.bundle import read_plan
    from dfmspec.run.matching import difference, matches, plan_again
    from dfmspec.run.preflight import Preflight

    # The record, and what of it is here.
    first = RunDir(find_run(run, runs).path.resolve())
    manifest = record_of(first)
    plan = read_plan(first.plan)
    again, changed = plan_again(plan, manifest, output_dir, dataset_path)
    _tell(matches(manifest, again))
    for line in changed:
        typer.echo(f"changed: {line}", err=True)
    if dry_run:
        return

    # The run, and the two beside each other.
    require_allowed(again, manifest.spec_file)
    text = first.spec.read_text(errors="surrogateescape") if first.spec.is_file() else None
    source = PlanSource(again, manifest.spec_file, text, tuple(manifest.overrides))
    code, made = started(source, Preflight(), None, detach=False)
    found = difference(first, RunDir(made))
    if found.is_exact:
        said = painted("the same to the last bit", GREEN, sys.stderr)
    elif found.first is None:
        said = "none to compare"
    else:
        said = f"they differ from iteration {found.first} on, by {found.largest:.1e} of a loss at most"
    typer.echo(f"losses of {found.iterations} iterations: {said}", err=True)
    if code == OK and exact and not found.is_exact:
        code = FINDINGS
    raise typer.Exit(code)


def _tell(found: list[Match]) -> None:
    """What matches, a line each, on stderr; what does not, last."""
    order = {True: 0, None: 1, False: 2}
    words = {True: ("same", GREEN), None: ("unknown", YELLOW), False: ("differs", RED)}
    width = max(len(match.name) for match in found)
    for match in sorted(found, key=lambda match: order[match.is_same]):
        word, colour = words[match.is_same]
        then, now = (_shown(text) for text in (match.then, match.now))
        said = now if match.is_same else f"{then} -> {now}"
        typer.echo(f"{painted(f'{word:<7}', colour, sys.stderr)}  {match.name:<{width}}  {said}", err=True)


def _shown(text: str) -> str:
    """A digest by its first twelve digits; anything else as it is."""
    return text[: len("sha256:") + 12] if text.startswith("sha256:") else text
