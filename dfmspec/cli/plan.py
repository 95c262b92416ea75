"""dfmspec plan: what would run, as text, as data, or as a bundle on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmspec.cli.arguments import (
    CellOption,
    Checked,
    DatasetPath,
    ProfileOption,
    cells_checked,
    check_format,
    complete_override,
    load_checked,
    named_folder,
    of_cell,
    require_valid,
    split_words,
)
from dfmspec.cli.validate import expanded
from dfmspec.cli.voice import note
from dfmspec.errors import STALE, StalePlanError, UsageError
from dfmspec.figures import counted

if TYPE_CHECKING:
    from dfmspec.plan.plan import Plan
    from dfmspec.read.resolve import Resolved

FORMATS = ("text", "json", "yaml", "sh")
_LISTED_FORMATS = ", ".join(FORMATS) + "; with --diff, text or markdown"

_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC... [KEY=VALUE]...",
        help="A spec, and overrides laid over it; or several, or folders of them, for --out and --check.",
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
        help="Print what differs from another plan, run or spec; or what KEY=VALUE would change, such as target=dfm.",
        metavar="OTHER",
    ),
]
_ExitCode = Annotated[
    bool,
    typer.Option("--exit-code", help="With --diff: exit code 3 when the plans differ."),
]
_Check = Annotated[
    str | None,
    typer.Option(
        help=(
            "A bundle written before, or for several specs the folder of theirs: exit code 3 when one is stale. "
            "Or `scheduler`: would Slurm take the job?"
        ),
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
    exit_code: _ExitCode = False,
    check: _Check = None,
    cell: CellOption = None,
    dataset_path: DatasetPath = None,
    profile: ProfileOption = None,
) -> None:
    """Resolve and compile a spec, and show the commands of every node.

    Several specs, folders of specs or the cells of a matrix are written or checked together, each as a bundle of its
    name in one folder: with --out FOLDER and --check FOLDER.

    Exit code 0: done. 1: errors in a spec. 2: wrong usage. 3: a bundle is stale; with --exit-code, the plans differ.

    Example: dfmspec plan spec.yaml cluster.nnodes=2 cluster.nproc_per_node=8
    """
    # What is asked for.
    answers = {"--out": out, "--ranks": ranks or None, "--why": why, "--diff": diff, "--check": check}
    form = _form(format_, node, answers)
    if exit_code and diff is None:
        raise UsageError("--exit-code says whether plans differ: give --diff OTHER too")
    names, overrides = split_words(words, profile)
    files = expanded(names)

    # Of many, bundles; of one, whatever is asked.
    wholes = [load_checked(file, overrides, dataset_path, ("spec",)) for file in files]
    is_about_one = cell is not None or node is not None or form == "yaml" or any((ranks, why, diff))
    # A folder of one spec counts as several: the next one is to change nothing.
    has_cells = any(whole.resolved.spec.cells for whole in wholes)
    is_written = out is not None or check is not None or form == "json"
    are_several = len(files) > 1 or files != names
    if not is_about_one and (has_cells or (are_several and is_written)):
        _answer_many(*_all_plans(wholes, overrides, dataset_path), out, check, form)
        return
    if diff is not None and cell is None and (has_cells or are_several) and _holds_bundles(diff):
        made, _ = _all_plans(wholes, overrides, dataset_path)
        _show_differences(made, diff, form, exit_code=exit_code)
        return
    _require_one(files)
    checked = of_cell(wholes[0], cell, overrides, dataset_path, ("spec",))
    require_valid(checked)
    if why is not None:
        _print_reason(checked.resolved, why)
    elif ranks:
        _print_ranks(checked.resolved, form)
    elif diff is not None:
        _answer_difference(
            checked, _other_plan(diff, checked, overrides, cell, dataset_path), diff, form, exit_code=exit_code
        )
    else:
        _answer(checked.resolved, out, check, form, node)


def _require_one(files: Sequence[str]) -> None:
    """Refuse several specs, where one answer is asked for."""
    if len(files) > 1:
        raise UsageError(
            f"that is asked of one spec, and there are {len(files)}: {', '.join(files)}; several are written with -o, "
            "and compared with --check or --diff FOLDER"
        )


def _holds_bundles(folder: Path) -> bool:
    """Whether a folder is one of bundles, rather than a bundle or a run itself."""
    return folder.is_dir() and not (folder / "plan.json").is_file()


def _answer(resolved: Resolved, out: Path | None, check: str | None, form: str, node: int | None) -> None:
    """One answer about a plan."""
    from dfmspec.plan.plan import make_plan

    made = make_plan(resolved)
    if check == "scheduler":
        _check_scheduler(made)
    elif check is not None:
        _check_golden(made, Path(check))
    elif out is not None:
        _write_bundle(resolved, made, out)
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
    check_format(form, (*FORMATS, "markdown"))
    wanted = [name for name, value in answers.items() if value is not None]
    if len(wanted) > 1:
        raise UsageError(f"{wanted[0]} and {wanted[1]} are two answers; ask for one at a time")
    if wanted:
        is_known = (wanted[0], form) in (("--ranks", "json"), ("--diff", "markdown"))
        if form != "text" and not is_known:
            raise UsageError(f"{wanted[0]} has no --format {form}")
    elif form == "markdown":
        raise UsageError("--format markdown is for --diff OTHER")
    if node is None:
        return form
    if wanted:
        raise UsageError(f"--node prints a script; leave {wanted[0]} out")
    if form not in ("text", "sh"):
        raise UsageError(f"--node prints a script; leave --format {form} out")
    return "sh"


def _all_plans(
    wholes: Sequence[Checked], overrides: Sequence[str], dataset_path: str | None
) -> tuple[dict[str, Plan], dict[str, Resolved]]:
    """The plans of all specs and of their cells, by the names that their bundles have; and what they are made of.

    Raises:
        UsageError: two have the same name.
    """
    from dfmspec.plan.plan import make_plan

    found = [cells_checked(whole, overrides, dataset_path, ("spec",)) for whole in wholes]
    require_valid(*chain.from_iterable(found))
    made: dict[str, Plan] = {}
    made_of: dict[str, Resolved] = {}
    for resolved, _ in chain.from_iterable(found):
        cell = resolved.spec.cell
        name = cell.name if cell is not None and len(wholes) == 1 else resolved["name"]
        if name in made:
            raise UsageError(f"two plans would have the name {name}; give the specs names of their own")
        made[name] = make_plan(resolved)
        made_of[name] = resolved
    return made, made_of


def _answer_many(
    made: Mapping[str, Plan], made_of: Mapping[str, Resolved], out: Path | None, check: str | None, form: str
) -> None:
    """The plans of several specs, or of a matrix: a bundle each in a folder of its name, all as data, or a line each.

    Raises:
        StalePlanError: a bundle, or several.
        UsageError: that form is of one plan alone.
    """
    if check == "scheduler" or form == "sh":
        names = ", ".join(made)
        raise UsageError(f"that is asked of one plan, and there are {len(made)}: {names}")
    if check is not None:
        stale = [name for name, plan in made.items() if not _is_golden(plan, Path(check) / name)]
        for orphan in sorted(folder.parent.name for folder in Path(check).glob("*/plan.json")):
            if orphan not in made:
                note(f"{check}/{orphan} is of none of these specs")
        if stale:
            raise StalePlanError(f"{len(stale)} of {counted(len(made), 'bundle')} stale: {', '.join(stale)}")
        typer.echo(f"{counted(len(made), 'bundle')} in {check}: as their specs have them", err=True)
    elif out is not None:
        from dfmspec.run.bundle import Source, require_new, write_bundle

        require_new(out)
        for name, plan in made.items():
            write_bundle(plan, out / name, Source.of(made_of[name]))
        typer.echo(out)
    elif form == "json":
        typer.echo(json.dumps([plan.as_json() for plan in made.values()], indent=2, sort_keys=True))
    else:
        typer.echo(cells_shown(made))


def _show_differences(made: Mapping[str, Plan], folder: Path, form: str, *, exit_code: bool) -> None:
    """What differs between several plans and their bundles in a folder; one without a bundle is new."""
    from dfmspec.run.bundle import PLAN, read_bundle

    differs = False
    for name, plan in made.items():
        if not (folder / name / PLAN).is_file():
            typer.echo(f"**{name}**: a new plan" if form == "markdown" else f"{name}: a new plan")
            differs = True
            continue
        if form != "markdown":
            typer.echo(f"{name}:")
        differs = _print_difference(read_bundle(folder / name), plan, form) or differs
        if form == "markdown":
            typer.echo()
    if exit_code and differs:
        raise typer.Exit(STALE)


def _is_golden(made: Plan, golden: Path) -> bool:
    """Whether a bundle is what its spec gives; if not, it is said in what it differs."""
    try:
        _check_golden(made, golden)
    except (StalePlanError, UsageError) as error:
        typer.echo(str(error), err=True)
        return False
    return True


def cells_shown(made: Mapping[str, Plan]) -> str:
    """The plans of a matrix, a line each."""
    lines = [f"{counted(len(made), 'cell')}; --cell NAME or NUMBER shows the plan of one"]
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


def _answer_difference(checked: Checked, other: Plan, named: Path, form: str, *, exit_code: bool) -> None:
    """--diff: what differs from another plan, or what an override would change; with --exit-code whether anything."""
    from dfmspec.plan.plan import make_plan

    made = make_plan(checked.resolved)
    before, after = (made, other) if _is_override(named) else (other, made)
    if _print_difference(before, after, form) and exit_code:
        raise typer.Exit(STALE)


def _print_difference(other: Plan, made: Plan, form: str = "text") -> bool:
    """What differs from another plan, for a terminal or for a pull request; whether anything does."""
    from dfmspec.plan import difference

    if other.target != made.target:
        text = difference.across_targets(other, made)
        typer.echo(f"```\n{text}\n```" if form == "markdown" else text)
        return True
    found = difference.differences(other, made)
    typer.echo(difference.in_markdown(found, made.name) if form == "markdown" else difference.described(found))
    return bool(found)


def _write_bundle(resolved: Resolved, made: Plan, folder: Path) -> None:
    """--out: the plan as files."""
    from dfmspec.run.bundle import Source, write_bundle

    write_bundle(made, folder, Source.of(resolved))
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


def _is_override(place: Path) -> bool:
    """Whether what a plan is compared with is itself with one more override: what would that change?"""
    return "=" in place.name and not place.exists()


def _other_plan(place: Path, ours: Checked, overrides: list[str], cell: str | None, dataset_path: str | None) -> Plan:
    """A saved plan, the plan of a run, or what another spec compiles to; or this one, with one more override.

    Of another spec with a matrix, the cell of the same name or number.
    """
    from dfmspec.plan.plan import make_plan
    from dfmspec.run.bundle import read_bundle, read_plan

    if place.is_dir():
        return read_bundle(place)
    if place.suffix == ".json":
        return read_plan(place)
    is_override = _is_override(place)
    if not is_override and not place.exists() and place.suffix not in (".yaml", ".yml"):
        return read_bundle(named_folder(place, "a bundle, a spec, a run directory"))
    if is_override:
        spec = ours.resolved.spec
        text = spec.documents[0].text if spec.documents else None
        words = [*overrides, str(place)]
        checked = load_checked(spec.file, words, dataset_path, ("spec",), text=text, cell=spec.cell)
    else:
        whole = load_checked(str(place), (), None, ("spec",))
        checked = of_cell(whole, cell if whole.resolved.spec.cells else None, (), None, ("spec",))
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
        before = read_bundle(golden)
        if before.plan_id != made.plan_id:
            _print_difference(before, made)
        names = ", ".join(stale)
        raise StalePlanError(
            f"{golden} is stale: {names} differ; if that is meant, remove it and write it again with -o"
        )


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
