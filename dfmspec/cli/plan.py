"""dfmspec plan: what would run, as text, as data, or as a bundle on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmspec.cli.arguments import (
    CellOption,
    Checked,
    DatasetPath,
    cells_checked,
    check_format,
    complete_override,
    load_checked,
    of_cell,
    one_file,
    require_valid,
)
from dfmspec.errors import StalePlanError, UsageError

if TYPE_CHECKING:
    from dfmspec.plan.plan import Plan
    from dfmspec.read.resolve import Resolved

FORMATS = ("text", "json", "yaml", "sh")
_LISTED_FORMATS = ", ".join(FORMATS)

_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC [KEY=VALUE]...",
        help="A spec, and overrides laid over it.",
        show_default=False,
        autocompletion=complete_override,
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the bundle into this folder, which must be new or empty."),
]
_Format = Annotated[
    str,
    typer.Option("--format", help=f"What to print: {_LISTED_FORMATS}."),
]
_Node = Annotated[
    int | None,
    typer.Option(help="Print the script of this node alone.", min=0),
]
_Ranks = Annotated[
    bool,
    typer.Option(
        "--ranks",
        help="Print each rank's node, GPU and groups; a star marks groups that reach over nodes.",
    ),
]
_Why = Annotated[
    str | None,
    typer.Option(help="Print where the value of this key comes from.", metavar="KEY"),
]
_Diff = Annotated[
    Path | None,
    typer.Option(
        help="Print what differs from another plan, run or spec; or from this spec with KEY=VALUE, such as target=dfm.",
        metavar="OTHER",
    ),
]
_Check = Annotated[
    str | None,
    typer.Option(
        help="A bundle written before: exit code 3 when it is stale. Or `scheduler`: would Slurm take the job?",
        metavar="BUNDLE",
    ),
]


def plan(
    words: _Words,
    out: _Out = None,
    format_: _Format = "text",
    node: _Node = None,
    ranks: _Ranks = False,
    why: _Why = None,
    diff: _Diff = None,
    check: _Check = None,
    cell: CellOption = None,
    dataset_path: DatasetPath = None,
) -> None:
    """Resolve and compile a spec, and show the commands of every node.

    Example: dfmspec plan spec.yaml cluster.nnodes=2 cluster.nproc_per_node=8
    """
    from dfmspec.plan.plan import make_plan

    # What is asked for.
    answers = {
        "--out": out,
        "--ranks": ranks or None,
        "--why": why,
        "--diff": diff,
        "--check": check,
    }
    form = _form(format_, node, answers)
    file, overrides = one_file(words)
    whole = load_checked(file, overrides, dataset_path, ("spec",))
    is_for_one = cell is not None or form not in ("text", "json") or any((ranks, why, diff, check))
    if whole.resolved.spec.cells and not is_for_one:
        _print_cells(cells_checked(whole, overrides, dataset_path, ("spec",)), out, form)
        return
    checked = of_cell(whole, cell, overrides, dataset_path, ("spec",))
    require_valid(checked)
    resolved = checked.resolved

    # Answers that need no plan.
    if why is not None:
        _print_reason(resolved, why)
        return
    if ranks:
        _print_ranks(resolved, form)
        return

    # Answers about the plan, each in place of the plan itself.
    made = make_plan(resolved)
    if diff is not None:
        _print_difference(_other_plan(diff, file, overrides), made)
    elif check == "scheduler":
        _check_scheduler(made)
    elif check is not None:
        _check_golden(made, Path(check))
    elif out is not None:
        _write_bundle(made, out)
    elif form == "json":
        _print_json(made)
    elif form == "yaml":
        _print_config(made)
    elif form == "sh":
        _print_script(made, node)
    else:
        _print_description(resolved, made)


def _form(form: str, node: int | None, answers: Mapping[str, object]) -> str:
    """The format to print in.

    Raises:
        UsageError: of two answers that were asked for, one would be left out.
    """
    check_format(form, FORMATS)
    wanted = [name for name, value in answers.items() if value is not None]
    if len(wanted) > 1:
        raise UsageError(f"{wanted[0]} and {wanted[1]} are two answers; ask for one at a time")
    if wanted:
        are_ranks_as_data = wanted[0] == "--ranks" and form == "json"
        if form != "text" and not are_ranks_as_data:
            raise UsageError(f"{wanted[0]} has no --format {form}")
    if node is None:
        return form
    if wanted:
        raise UsageError(f"--node prints a script; leave {wanted[0]} out")
    if form not in ("text", "sh"):
        raise UsageError(f"--node prints a script; leave --format {form} out")
    return "sh"


def _print_cells(cells: Sequence[Checked], out: Path | None, form: str) -> None:
    """The plans of a matrix: a line each, all as data, or a bundle each in a folder of its name."""
    from dfmspec.plan.plan import make_plan

    require_valid(*cells)
    made: dict[str, Plan] = {}
    for resolved, _ in cells:
        made[str(resolved.spec.cell and resolved.spec.cell.name)] = make_plan(resolved)
    if out is not None:
        from dfmspec.run.bundle import require_new, write_bundle

        require_new(out)
        for name, plan in made.items():
            write_bundle(plan, out / name)
        typer.echo(out)
    elif form == "json":
        typer.echo(json.dumps([plan.as_json() for plan in made.values()], indent=2, sort_keys=True))
    else:
        typer.echo(cells_shown(made))


def cells_shown(made: Mapping[str, Plan]) -> str:
    """The cells of a matrix with their plans, a line each."""
    lines = [f"{len(made)} cells; --cell NAME or NUMBER shows the plan of one"]
    for number, (name, plan) in enumerate(made.items(), 1):
        lines.append(f"  {number:>3}  {plan.short_id}  {name}")
    return "\n".join(lines)


# One function an answer. Each imports what it needs: the others do not wait for it.


def _print_reason(resolved: Resolved, key: str) -> None:
    """--why: where a value comes from."""
    from dfmspec.plan.describe import explain

    typer.echo(explain(resolved, key))


def _print_ranks(resolved: Resolved, form: str) -> None:
    """--ranks: each rank's place, as a table or as data."""
    from dfmspec.plan import describe

    if form == "json":
        typer.echo(json.dumps(describe.ranks(resolved)))
    else:
        typer.echo(describe.rank_table(resolved))


def _print_difference(other: Plan, made: Plan) -> None:
    """--diff: what differs from another plan."""
    from dfmspec.plan import difference

    if other.target != made.target:
        typer.echo(difference.across_targets(other, made))
        return
    found = difference.differences(other, made)
    typer.echo(difference.described(found))


def _write_bundle(made: Plan, folder: Path) -> None:
    """--out: the plan as files."""
    from dfmspec.run.bundle import write_bundle

    write_bundle(made, folder)
    typer.echo(folder)


def _print_json(made: Plan) -> None:
    """--format json: the plan as data."""
    typer.echo(json.dumps(made.as_json(), indent=2, sort_keys=True))


def _print_config(made: Plan) -> None:
    """--format yaml: the configuration that the trainer is given."""
    from dfmspec.plan.plan import config_text

    typer.echo(config_text(made.config), nl=False)


def _print_script(made: Plan, node: int | None) -> None:
    """--format sh, --node: the script of one node, or one for all, which reads its rank from the environment.

    Raises:
        UsageError: there is no such node.
    """
    from dfmspec.plan.scripts import node_script

    if node is not None and node >= made.nnodes:
        raise UsageError(f"--node {node}: the plan has nodes 0 to {made.nnodes - 1}")
    if node is None and made.nnodes == 1:
        node = 0
    typer.echo(node_script(made, node), nl=False)


def _print_description(resolved: Resolved, made: Plan) -> None:
    """The plan for a reader."""
    from dfmspec.plan import describe

    typer.echo(describe.described(resolved, made))


def _other_plan(place: Path, spec: str, overrides: list[str]) -> Plan:
    """A saved plan, the plan of a run, or what another spec compiles to; or this one, with one more override."""
    from dfmspec.plan.plan import make_plan
    from dfmspec.run.bundle import read_bundle, read_plan

    if place.is_dir():
        return read_bundle(place)
    if place.suffix == ".json":
        return read_plan(place)
    is_override = "=" in place.name and not place.exists()
    file, words = (spec, [*overrides, str(place)]) if is_override else (str(place), [])
    checked = load_checked(file, words, None, ("spec",))
    require_valid(checked)
    return make_plan(checked.resolved)


def _check_golden(made: Plan, golden: Path) -> None:
    """--check BUNDLE: whether the plan would still write what is there.

    Raises:
        StalePlanError: it would write something else.
    """
    from dfmspec.run.bundle import PLAN, read_bundle, stale_files

    if not (golden / PLAN).is_file():
        raise UsageError(f"--check {golden} is no bundle: it has no {PLAN}; dfmspec plan -o {golden} writes one")
    stale = stale_files(made, golden)
    if stale:
        _print_difference(read_bundle(golden), made)
        names = ", ".join(stale)
        raise StalePlanError(f"{golden} is stale: {names} differ; look at the difference, then write it again with -o")


def _check_scheduler(made: Plan) -> None:
    """--check scheduler: ask the launcher's scheduler whether it would take the job.

    Raises:
        PreflightError: it would not.
        UsageError: the launcher has no scheduler.
    """
    import tempfile

    from dfmspec.run.bundle import write_bundle
    from dfmspec.run.launch import launcher
    from dfmspec.spec.launchers import LAUNCHERS

    kind = made.launcher["kind"]
    check = launcher(kind).check
    if check is None:
        able = ", ".join(other for other in LAUNCHERS if launcher(other).check)
        raise UsageError(f"--check scheduler is for launcher {able}, and the plan's is {kind}")
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "plan"
        write_bundle(made, bundle)
        typer.echo(check(bundle))
