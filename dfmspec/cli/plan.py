"""dfmspec plan: what would run, as text, as data, or as a bundle on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfmspec.cli.arguments import check_format, load_checked, one_file, require_valid
from dfmspec.errors import UsageError

if TYPE_CHECKING:
    from dfmspec.plan import Plan
    from dfmspec.resolve import Resolved

FORMATS = ("text", "json", "yaml", "sh")


def plan(
    words: Annotated[list[str], typer.Argument(metavar="SPEC [KEY=VALUE]...", help="A spec, and overrides laid over it.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the bundle into this folder, which must be new or empty.")] = None,
    format_: Annotated[str, typer.Option("--format", help=f"What to print: {', '.join(FORMATS)}.")] = "text",
    node: Annotated[int | None, typer.Option(help="With --format sh: the script of this node.", min=0)] = None,
    why: Annotated[str | None, typer.Option(help="Print where the value of this key comes from.", metavar="KEY")] = None,
    dataset_path: Annotated[str | None, typer.Option(help="Folder of the WebDataset, as the training script takes it.")] = None,
) -> None:
    """Resolve and compile a spec, and show the commands of every node.

    Example: dfmspec plan spec.yaml cluster.nnodes=2 cluster.nproc_per_node=8
    """
    from dfmspec.plan import config_text, make_plan, node_script, write_bundle

    form = check_format(format_, FORMATS)
    file, overrides = one_file(words)
    resolved, findings = load_checked(file, overrides, dataset_path, ("spec",))
    require_valid(resolved, findings)
    if why:
        typer.echo(explain(resolved, why))
        return
    made = make_plan(resolved)
    if out is not None:
        write_bundle(made, out)
        typer.echo(out)
        return
    if node is not None and node >= len(made.nodes):
        raise UsageError(f"--node {node}: the plan has nodes 0 to {len(made.nodes) - 1}")
    if form == "json":
        typer.echo(json.dumps(made.as_json(), indent=2, sort_keys=True))
    elif form == "yaml":
        typer.echo(config_text(made.config), nl=False)
    elif form == "sh":
        chosen = made.nodes if node is None else (made.nodes[node],)
        typer.echo("\n".join(node_script(made, command) for command in chosen), nl=False)
    else:
        typer.echo(described(resolved, made))


def explain(resolved: Resolved, key: str) -> str:
    """Where a value comes from."""
    if key not in resolved.values:
        raise UsageError(f"--why {key}: there is no such key; dfmspec schema experiment lists them")
    origin = resolved.origins[key]
    place = origin.note if origin.layer == "derived" else str(origin.span)
    return f"{key} = {json.dumps(resolved.values[key])}\n  {origin.layer}: {place}"


def described(resolved: Resolved, made: Plan) -> str:
    """The plan for a reader: sizes, then each node's command as the how-to writes it."""
    from dfmspec.plan import shell_command
    from dfmspec.targets.megatron_core import layout

    ranks = layout(resolved.values)
    microbatches = resolved["train.global_batch_size"] // (resolved["train.micro_batch_size"] * max(1, ranks.data_parallel_size))
    lines = [
        f"{made.name}: recipe {resolved['recipe']} for target {made.target}, plan {made.plan_id[:12]}",
        f"  {ranks.world_size} ranks = {resolved['cluster.nnodes']} nodes x {resolved['cluster.nproc_per_node']} on {resolved['cluster.device']}: "
        f"TP: {ranks.tensor_model_parallel_size}, "
        f"PP: {ranks.pipeline_model_parallel_size}, CP: {ranks.context_parallel_size} -> DP: {ranks.data_parallel_size}",
        f"  global batch {resolved['train.global_batch_size']} packs = {microbatches} microbatches x {resolved['train.micro_batch_size']} "
        f"x DP {ranks.data_parallel_size}; {resolved['train.train_iters']} iterations; a checkpoint every {resolved['checkpoint.save_interval']}",
    ]
    set_by_user = [(key, origin) for key, origin in resolved.origins.items() if origin.is_users]
    if set_by_user:
        lines += ["  set:", *(f"    {key} = {json.dumps(resolved.values[key])}  ({origin.span})" for key, origin in set_by_user)]
    for node in made.nodes:
        lines.append(f"\n# node {node.node_rank}")
        lines += [f"export {name}={value}" for name, value in made.env.items()]
        lines.append(shell_command(node.argv))
    return "\n".join(lines)
