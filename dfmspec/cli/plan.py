"""dfmspec plan: what would run, as text, as data, or as a bundle on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmspec.cli.arguments import check_format, complete_override, load_checked, one_file, require_valid
from dfmspec.errors import StalePlanError, UsageError

if TYPE_CHECKING:
    from dfmspec.plan.plan import Plan

FORMATS = ("text", "json", "yaml", "sh")


def plan(
    words: Annotated[
        list[str], typer.Argument(metavar="SPEC [KEY=VALUE]...", help="A spec, and overrides laid over it.",
                                  show_default=False, autocompletion=complete_override),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the bundle into this folder, which must be new or empty.")] = None,
    format_: Annotated[str, typer.Option("--format", help=f"What to print: {', '.join(FORMATS)}.")] = "text",
    node: Annotated[int | None, typer.Option(help="Print the script of this node alone.", min=0)] = None,
    ranks: Annotated[bool, typer.Option("--ranks", help="Print each rank's node, GPU and groups; a star marks groups that reach over nodes.")] = False,
    why: Annotated[str | None, typer.Option(help="Print where the value of this key comes from.", metavar="KEY")] = None,
    diff: Annotated[Path | None, typer.Option(help="Print what differs from another plan, run or spec.", metavar="OTHER")] = None,
    check: Annotated[
        str | None, typer.Option(help="A bundle written before: exit code 3 when it is stale. Or `scheduler`: would Slurm take the job?", metavar="BUNDLE"),
    ] = None,
    dataset_path: Annotated[str | None, typer.Option(help="Folder of the WebDataset, or a metadataset's .yaml, as the training script takes it.")] = None,
) -> None:
    """Resolve and compile a spec, and show the commands of every node.

    Example: dfmspec plan spec.yaml cluster.nnodes=2 cluster.nproc_per_node=8
    """
    from dfmspec.plan.describe import described, explain, rank_table
    from dfmspec.plan.describe import ranks as every_rank
    from dfmspec.plan.plan import config_text, make_plan
    from dfmspec.plan.scripts import node_script
    from dfmspec.run.bundle import write_bundle

    form = _form(format_, node, {"--out": out, "--ranks": ranks or None, "--why": why, "--diff": diff, "--check": check})
    file, overrides = one_file(words)
    resolved, findings = load_checked(file, overrides, dataset_path, ("spec",))
    require_valid(resolved, findings)
    if why is not None:
        typer.echo(explain(resolved, why))
        return
    if ranks:
        typer.echo(json.dumps(every_rank(resolved)) if form == "json" else rank_table(resolved))
        return
    made = make_plan(resolved)
    if diff is not None:
        from dfmspec.plan.difference import described as told
        from dfmspec.plan.difference import differences

        typer.echo(told(differences(_other_plan(diff), made)))
        return
    if check == "scheduler":
        _check_scheduler(made)
        return
    if check is not None:
        _check_golden(made, Path(check))
        return
    if out is not None:
        write_bundle(made, out)
        typer.echo(out)
        return
    if node is not None and node >= made.nnodes:
        raise UsageError(f"--node {node}: the plan has nodes 0 to {made.nnodes - 1}")
    if form == "json":
        typer.echo(json.dumps(made.as_json(), indent=2, sort_keys=True))
    elif form == "yaml":
        typer.echo(config_text(made.config), nl=False)
    elif form == "sh":
        single = 0 if node is None and made.nnodes == 1 else node
        typer.echo(node_script(made, single), nl=False)
    else:
        typer.echo(described(resolved, made))


def _form(form: str, node: int | None, asked: dict[str, object]) -> str:
    """What to print.

    Raises:
        UsageError: of two answers that were asked for, one would be left out.
    """
    check_format(form, FORMATS)
    wanted = [name for name, value in asked.items() if value is not None]
    if len(wanted) > 1:
        raise UsageError(f"{wanted[0]} and {wanted[1]} are two answers; ask for one at a time")
    if wanted and form != "text" and (wanted, form) != (["--ranks"], "json"):
        raise UsageError(f"{wanted[0]} has no --format {form}")
    if node is not None and (wanted or form not in ("text", "sh")):
        raise UsageError(f"--node prints a script; leave {wanted[0] if wanted else f'--format {form}'} out")
    return "sh" if node is not None else form


def _other_plan(place: Path) -> Plan:
    """A saved plan, the plan of a run, or what another spec compiles to."""
    from dfmspec.plan.plan import make_plan
    from dfmspec.run.bundle import read_bundle, read_plan

    if place.is_dir():
        return read_bundle(place)
    if place.suffix == ".json":
        return read_plan(place)
    resolved, findings = load_checked(str(place), [], None, ("spec",))
    require_valid(resolved, findings)
    return make_plan(resolved)


def _check_golden(made: Plan, golden: Path) -> None:
    """Raises:
    StalePlanError: the bundle is not what the plan would write now.
    """
    from dfmspec.plan.difference import described as told
    from dfmspec.plan.difference import differences
    from dfmspec.run.bundle import PLAN, read_bundle, stale_files

    if not (golden / PLAN).is_file():
        raise UsageError(f"--check {golden} is no bundle: it has no {PLAN}; dfmspec plan -o {golden} writes one")
    if stale := stale_files(made, golden):
        typer.echo(told(differences(read_bundle(golden), made)))
        raise StalePlanError(f"{golden} is stale: {', '.join(stale)} differ; look at the difference, then write it again with -o")


def _check_scheduler(made: Plan) -> None:
    """Ask the launcher's scheduler whether it would take the job.

    Raises:
        PreflightError: it would not.
    """
    import tempfile

    from dfmspec.run.bundle import write_bundle
    from dfmspec.run.launch import launcher
    from dfmspec.spec.launchers import LAUNCHERS

    check = launcher(made.launcher["kind"]).check
    if check is None:
        asked = ", ".join(kind for kind in LAUNCHERS if launcher(kind).check)
        raise UsageError(f"--check scheduler is for launcher {asked}, and the plan's is {made.launcher['kind']}")
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(made, Path(folder) / "plan")
        typer.echo(check(Path(folder) / "plan"))
