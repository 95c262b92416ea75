"""A plan for a reader: sizes, ranks, reasons, commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dfmspec.errors import UsageError
from dfmspec.estimate.disk import checkpoint_bytes
from dfmspec.plan.environment import reason, shell_line
from dfmspec.plan.plan import Plan, config_text
from dfmspec.plan.scripts import shell_command
from dfmspec.read.load import Origin, unaliased
from dfmspec.read.resolve import Resolved
from dfmspec.read.structure import meant_key
from dfmspec.spec.launchers import LAUNCHERS
from dfmspec.targets import catalogue, target_module
from dfmspec.targets.layout import Layout, RankPlace, crossing, layout_of, places

_SHOWN_ONE_BY_ONE, _LONG = 4, 16


def _sizes(resolved: Resolved, ranks: Layout) -> list[str]:
    """How much it is: parameters, tokens, operations, disk; and which groups leave a node."""

    values = resolved.values
    interval, iters = values["checkpoint.save_interval"], values["train.train_iters"] or 0
    saves = -(-iters // interval) if interval else 1
    kept = saves if (values["checkpoint.most_recent_k"] or -1) < 1 else min(saves, max(2, values["checkpoint.most_recent_k"]))
    parameters = target_module(values["target"]).parameters(values)
    each = checkpoint_bytes(parameters, averaged="diffusion.ema_decay" in values)
    lines = [
        f"  {parameters / 1e6:,.1f} M parameters{_work(values, ranks)}",
        f"  a checkpoint is about {_figure(each / 1e9)} GB; {kept} of them {_figure(kept * each / 1e9)} GB",
    ]
    if crossed := crossing(ranks, values["cluster.nproc_per_node"]):
        lines.append(f"  groups that reach over nodes: {', '.join(crossed)}")
    return lines


def _figure(value: float) -> str:
    """Three digits, and never an exponent for a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _work(values: Mapping[str, Any], ranks: Layout) -> str:
    """Tokens and operations of an iteration."""
    packs = values["train.global_batch_size"]
    tokens, each, of_what = target_module(values["target"]).work(values)
    operations = packs * each
    return (
        f"; an iteration is {packs * tokens:,} tokens and {_figure(operations / 1e15)} PFLOP ({of_what}), "
        f"{_figure(operations / ranks.world_size / 1e12)} TFLOP a rank"
    )


def ranks(resolved: Resolved) -> dict[str, Any]:
    """Every rank with its node, its GPU and its coordinate in each group; and the kinds of groups that reach over nodes."""
    every, nproc = layout_of(resolved.values), resolved["cluster.nproc_per_node"]
    return {"ranks": [place._asdict() for place in places(every, nproc)], "over_nodes": [name.lower() for name in crossing(every, nproc)]}


def rank_table(resolved: Resolved) -> str:
    """The same for a reader; a group's name has a star when a group of the kind reaches over nodes."""
    found = ranks(resolved)
    names = [name + "*" * (name in found["over_nodes"]) for name in RankPlace._fields]
    return "\n".join("".join(f"{value:>7}" for value in row) for row in (names, *(place.values() for place in found["ranks"])))


def explain(resolved: Resolved, key: str) -> str:
    """Where a value comes from, and what it was derived from, down to what somebody set."""
    target, legal = target_module(resolved.spec.target), catalogue(resolved.spec.target)
    key = unaliased(key)
    if known := legal.fields(key):
        raise UsageError(f"--why {key}: that is a section; name one of its keys: {', '.join(f'{key}.{name}' for name in known[:3])}, ...")
    if key not in resolved.values:
        section, _, name = key.rpartition(".")
        meant = meant_key(name, section, resolved.spec.target)
        raise UsageError(f"--why {key}: there is no such key; {f'did you mean {meant}?' if meant else 'dfmspec schema experiment lists them'}")
    sources = {derivation.key: derivation.sources for derivation in target.DERIVED}
    lines: list[str] = []
    told: set[str] = set()

    def tell(key: str, depth: int) -> None:
        origin, indent = resolved.origins[key], "  " * depth
        lines.append(f"{indent}{key} = {json.dumps(resolved.values[key])}  {_where(origin)}")
        if under := resolved.spec.under.get(key):
            layers = (*under, (resolved.spec.values[key], resolved.spec.origins[key]))
            lines.append(f"{indent}  layers: " + " < ".join(f"{json.dumps(value)} ({_where(layer)})" for value, layer in layers))
        for source in sources.get(key, ()) if origin.layer == "derived" and key not in told else ():
            told.add(key)
            tell(source, depth + 1)

    tell(key, 0)
    reading = target.read_back(resolved.values, config_text(target.config(resolved.values)))
    section, _, name = key.rpartition(".")
    if reading is not None and name in (reading.tree.get(section) or {}) and reading[key] != resolved.values[key]:
        source = (legal.field(key) or {}).get("x-overwritten-by")
        lines.append(f"upstream has {json.dumps(reading[key])}: " + (f"{source} is copied over it" if source else "it fills in what is null"))
        if source:
            tell(source, 1)
    return "\n".join(lines)


def _where(origin: Origin) -> str:
    place = origin.note if origin.layer == "derived" else "" if origin.layer == "default" else str(origin.span)
    return origin.layer + (f": {place}" if place else "")


def described(resolved: Resolved, made: Plan) -> str:
    """The plan for a reader: sizes, then each node's command as the how-to writes it."""
    every = layout_of(resolved.values)
    microbatches = resolved["train.global_batch_size"] // (resolved["train.micro_batch_size"] * max(1, every.data_parallel_size))
    lines = [
        f"{made.name}: recipe {resolved['recipe']} for target {made.target}, plan {made.plan_id[:12]}",
        f"  {every.world_size} ranks = {resolved['cluster.nnodes']} nodes x {resolved['cluster.nproc_per_node']} on {resolved['cluster.device']}: "
        f"TP: {every.tensor_model_parallel_size}, "
        f"PP: {every.pipeline_model_parallel_size}, CP: {every.context_parallel_size} -> DP: {every.data_parallel_size}",
        f"  global batch {resolved['train.global_batch_size']} packs = {microbatches} microbatches x {resolved['train.micro_batch_size']} "
        f"x DP {every.data_parallel_size}; {resolved['train.train_iters']} iterations; a checkpoint every {resolved['checkpoint.save_interval']}",
    ]
    lines += _sizes(resolved, every)
    set_by_user = [(key, origin) for key, origin in resolved.origins.items() if origin.is_users]
    if set_by_user:
        lines += ["  set:", *(f"    {key} = {_shortened(resolved.values[key])}  ({origin.span})" for key, origin in set_by_user)]
    for node in [None] if made.nnodes > _SHOWN_ONE_BY_ONE else range(made.nnodes):
        lines.append(f"\n# every node, NODE_RANK 0 to {made.nnodes - 1}" if node is None else f"\n# node {node}")
        lines += [f"{shell_line(name, value)}  # {reason(name, resolved['launcher.env'])}" for name, value in made.env.items()]
        lines.append(shell_command([word._replace(text=made.seen(word.text)) for word in made.words(node)]))
    start = LAUNCHERS[made.launcher["kind"]]
    how = start.how_to_start if target_module(made.target).OWN else start.how_to_start_bundle
    return "\n".join([*lines, *([f"\n# launcher {made.launcher['kind']}: {how}"] if how else [])])


def _shortened(value: Any) -> str:
    """A value as JSON; of a long list, the ends."""
    if isinstance(value, list) and len(value) > _LONG:
        return f"[{json.dumps(value[0])}, {json.dumps(value[1])}, ... {len(value)} in all ..., {json.dumps(value[-1])}]"
    return json.dumps(value)
