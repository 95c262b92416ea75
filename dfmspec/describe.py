"""A plan for a reader: sizes, ranks, reasons, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from dfmspec.catalogue import catalogue
from dfmspec.environment import reason
from dfmspec.errors import UsageError
from dfmspec.layout import Layout, Place, crossing, places
from dfmspec.load import ALIASES, Origin
from dfmspec.plan import Plan, config_text
from dfmspec.resolve import Resolved
from dfmspec.scripts import shell_command
from dfmspec.size import checkpoint_bytes, flops_per_pack, parameters
from dfmspec.structure import meant_key
from dfmspec.targets import target_module
from dfmspec.targets.megatron_core import layout

_SHOWN_ONE_BY_ONE = 4
_HOW_TO_START = {
    "ssh": "dfmspec run starts each node's command by ssh",
    "slurm": "dfmspec run submits and watches it; or write it with -o DIR, and sbatch DIR/job.sbatch",
    "kubernetes": "write it with -o DIR, and kubectl apply -f DIR/jobset.yaml",
}


def _sizes(resolved: Resolved, ranks: Layout) -> list[str]:
    """How much it is: parameters, tokens, operations, disk; and which groups leave a node."""

    values = resolved.values
    interval, iters = values["checkpoint.save_interval"], values["train.train_iters"] or 0
    saves = -(-iters // interval) if interval else 1
    kept = saves if (values["checkpoint.most_recent_k"] or -1) < 1 else min(saves, max(2, values["checkpoint.most_recent_k"]))
    each = checkpoint_bytes(values)
    lines = [
        f"  {parameters(values) / 1e6:,.1f} M parameters{_work(values, ranks)}",
        f"  a checkpoint is about {_figure(each / 1e9)} GB; {kept} of them {_figure(kept * each / 1e9)} GB",
    ]
    if crossed := crossing(ranks, values["cluster.nproc_per_node"]):
        lines.append(f"  groups that reach over nodes: {', '.join(crossed)}")
    return lines


def _figure(value: float) -> str:
    """Three digits, and never an exponent for a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _work(values: Mapping[str, Any], ranks: Layout) -> str:
    """Tokens and operations of an iteration; nothing for a network whose packs have no fixed length."""
    if values["target"] not in ("megatron_core", "dfm"):
        return ""
    length, packs = values["dataset.task_encoder_seq_length"], values["train.global_batch_size"]
    embedded = values["data.source"] != "webdataset" and "data.resolution" in values
    tokens = min(length, (values["data.resolution"] // 8 // values["model.patch_spatial"]) ** 2) if embedded else length
    of_what = f"samples of {tokens} tokens" if embedded else "one sample a pack, the most it can be"
    operations = packs * flops_per_pack(values, tokens)
    return (
        f"; an iteration is {packs * length:,} tokens and {_figure(operations / 1e15)} PFLOP ({of_what}), "
        f"{_figure(operations / ranks.world_size / 1e12)} TFLOP a rank"
    )


def rank_table(resolved: Resolved) -> str:
    """Every rank: its node and GPU, and its coordinate in each group."""
    rows = [Place._fields, *places(layout(resolved.values), resolved["cluster.nproc_per_node"])]
    return "\n".join("".join(f"{value:>7}" for value in row) for row in rows)


def explain(resolved: Resolved, key: str) -> str:
    """Where a value comes from, and what it was derived from, down to what somebody set."""
    target, legal = target_module(resolved.spec.target), catalogue(resolved.spec.target)
    key = next((f"checkpoint.{meant}" for alias, meant in ALIASES if key == f"checkpoint.{alias}"), key)
    if key not in resolved.values:
        section, _, name = key.rpartition(".")
        meant = meant_key(name, section, legal)
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
    lines += _sizes(resolved, ranks)
    set_by_user = [(key, origin) for key, origin in resolved.origins.items() if origin.is_users]
    if set_by_user:
        lines += ["  set:", *(f"    {key} = {json.dumps(resolved.values[key])}  ({origin.span})" for key, origin in set_by_user)]
    every = made.nnodes > _SHOWN_ONE_BY_ONE
    for node in [None] if every else range(made.nnodes):
        lines.append(f"\n# every node, NODE_RANK 0 to {made.nnodes - 1}" if node is None else f"\n# node {node}")
        lines += [f"export {name}={shlex.quote(value)}  # {reason(name, resolved['launcher.env'])}" for name, value in made.env.items()]
        lines.append(shell_command([word._replace(text=made.seen(word.text)) for word in made.words(node)]))
    if how := _HOW_TO_START.get(made.launcher["kind"]):
        lines.append(f"\n# launcher {made.launcher['kind']}: {how}")
    return "\n".join(lines)
