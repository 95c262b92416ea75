"""A plan for a reader: sizes, ranks, reasons, commands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dfmspec.errors import UsageError
from dfmspec.estimate.disk import checkpoint_bytes
from dfmspec.figures import counted, size, with_prefix
from dfmspec.plan.environment import reason, shell_line
from dfmspec.plan.plan import Plan, config_text
from dfmspec.plan.scripts import shell_command
from dfmspec.read.load import Origin, unaliased
from dfmspec.read.resolve import Resolved
from dfmspec.read.structure import meant_key
from dfmspec.spec.launchers import LAUNCHERS
from dfmspec.targets import TARGETS, Reading, catalogue, target_module
from dfmspec.targets.layout import Layout, RankPlace, crossing, layout_of, places


def described(resolved: Resolved, made: Plan) -> str:
    """The plan for a reader: sizes, what nobody set and matters, then the command of a node as the how-to has it."""
    layout = layout_of(resolved.values)
    lines = _head(resolved, made, layout)
    lines += _sizes(resolved, layout)
    lines += _left_open(resolved)

    # The commands: one for all nodes, which differ by their rank alone.
    if made.nnodes > 1:
        lines.append(f"\n# every node, with NODE_RANK 0 to {made.nnodes - 1}")
        lines += _command(resolved, made, None)
    else:
        lines.append("\n# the node")
        lines += _command(resolved, made, 0)

    # What is left to do by hand.
    kind = made.launcher["kind"]
    how = LAUNCHERS[kind].how_to_start
    if not target_module(made.target).OWN:
        how = LAUNCHERS[kind].how_to_start_script
    if how:
        lines.append(f"\n# launcher {kind}: {how}")
    return "\n".join(lines)


def _head(resolved: Resolved, made: Plan, layout: Layout) -> list[str]:
    """What is trained, on how many ranks, in what batches."""
    values = resolved.values
    dp = layout.data_parallel_size
    trainer = f"{made.target} {TARGETS[made.target].revision}"
    lines = [f"{made.name}: recipe {values['recipe']} for target {trainer}, plan {made.short_id}"]

    # The ranks.
    nodes = counted(values["cluster.nnodes"], "node")
    device = values["cluster.gpu"] or values["cluster.device"]
    lines.append(
        f"  {counted(layout.world_size, 'rank')} = {nodes} x {values['cluster.nproc_per_node']} on {device}: "
        f"TP: {layout.tensor_model_parallel_size}, "
        f"PP: {layout.pipeline_model_parallel_size}, "
        f"CP: {layout.context_parallel_size} -> DP: {dp}"
    )

    # The batches.
    packs = values["train.global_batch_size"]
    micro = values["train.micro_batch_size"]
    microbatches = counted(packs // (micro * max(1, dp)), "microbatch", "microbatches")
    lines.append(f"  global batch {counted(packs, 'pack')} = {microbatches} x {micro} x DP {dp}")
    lines.append(f"  {counted(values['train.train_iters'] or 0, 'iteration')}; {_when_it_saves(values)}")
    return lines


def _when_it_saves(values: Mapping[str, Any]) -> str:
    interval = values["checkpoint.save_interval"]
    if values["checkpoint.save"] is None:
        return "no checkpoints"
    if interval is None:
        return "a checkpoint at the end"
    return f"a checkpoint every {interval:,}"


def _sizes(resolved: Resolved, layout: Layout) -> list[str]:
    """How much it is: parameters, tokens, operations, disk; and which groups leave a node."""
    # In the network.
    values = resolved.values
    parameters = target_module(values["target"]).parameters(values)
    lines = [f"  {parameters / 1e6:,.1f} M parameters; {_work(values, layout)}"]

    # On disk.
    kept = _kept_checkpoints(values)
    each = checkpoint_bytes(parameters, averaged="diffusion.ema_decay" in values)
    if kept:
        most = f"; the {kept} that are kept, {size(kept * each)}" if kept > 1 else ""
        lines.append(f"  a checkpoint is about {size(each)}{most}")
    crossed = ", ".join(crossing(layout, values["cluster.nproc_per_node"]))
    if crossed:
        lines.append(f"  groups that reach over nodes: {crossed}")
    return lines


def _kept_checkpoints(values: Mapping[str, Any]) -> int:
    """How many checkpoints are on disk at the end of training."""
    if values["checkpoint.save"] is None:
        return 0
    interval = values["checkpoint.save_interval"]
    iters: int = values["train.train_iters"] or 0
    saves = 1
    if interval:
        saves = -(-iters // interval)
    most_recent = values["checkpoint.most_recent_k"] or -1
    if most_recent < 1:  # all are kept
        return saves
    return min(saves, max(2, most_recent))


def _work(values: Mapping[str, Any], layout: Layout) -> str:
    """Tokens and operations of an iteration."""
    packs = values["train.global_batch_size"]
    work = target_module(values["target"]).work(values)
    tokens = packs * work.tokens
    operations = packs * work.flops
    each = with_prefix(operations / layout.world_size, "FLOP")
    return f"an iteration is {tokens:,} tokens and {with_prefix(operations, 'FLOP')} ({work.held}), {each} a rank"


_MATTERS = (
    "cluster.nproc_per_node",
    "dataset.path",
    "dataset.task_encoder_seq_length",
    "dataset.packing_buffer_size",
    "train.global_batch_size",
    "train.train_iters",
    "train.eval_interval",
    "train.eval_iters",
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "scheduler.lr_decay_style",
    "scheduler.lr_decay_iters",
    "scheduler.lr_warmup_iters",
    "mixed_precision.recipe",
    "mixed_precision.bf16",
    "diffusion.ema_decay",
    "checkpoint.save",
    "checkpoint.save_interval",
    "checkpoint.most_recent_k",
    "rng.seed",
)
"""Keys that decide what comes of a run, its length or its place: worth a look where nobody set them."""


def _left_open(resolved: Resolved) -> list[str]:
    """What follows from other values, or is a default, and matters: what a reader of the spec does not see there."""
    rows = []
    for key in _MATTERS:
        origin = resolved.origins.get(key)
        if origin is None or origin.is_set_by_user:
            continue
        why = origin.note if origin.layer == "derived" else origin.layer
        rows.append((f"{key} = {json.dumps(resolved.values[key])}", why))
    if not rows:
        return []
    width = max(len(words) for words, _ in rows)
    return ["  not set, so derived or by default:", *(f"    {words:<{width}}  {why}" for words, why in rows)]


def _command(resolved: Resolved, made: Plan, node: int | None) -> list[str]:
    """What one node, or (None) any of them, does: its variables with their reasons, and its command."""
    lines = []
    for name, value in made.env.items():
        line = shell_line(name, value)
        why = reason(name, resolved.values)
        lines.append(f"{line}  # {why}")
    for name, reference in made.secrets.items():
        lines.append(f"export {name}=...  # launcher.env: secret, {reference} of each node")
    words = []
    for word in made.words(node):
        words.append(word._replace(text=made.seen(word.text)))
    lines.append(shell_command(words))
    return lines


def ranks(resolved: Resolved) -> dict[str, Any]:
    """Every rank with its node, its GPU and its coordinate in each group; and the kinds of groups that leave a node."""
    layout = layout_of(resolved.values)
    nproc = resolved["cluster.nproc_per_node"]
    return {
        "ranks": [place._asdict() for place in places(layout, nproc)],
        "over_nodes": [name.lower() for name in crossing(layout, nproc)],
    }


def rank_table(resolved: Resolved) -> str:
    """The ranks as a table; a group's name has a star when a group of the kind reaches over nodes."""
    found = ranks(resolved)
    names = [name + "*" * (name in found["over_nodes"]) for name in RankPlace._fields]
    lines = [_row(names)]
    lines += [_row(place.values()) for place in found["ranks"]]
    return "\n".join(lines)


def _row(cells: Iterable[Any]) -> str:
    """A line of a table, its cells flush right."""
    return "".join(f"{cell:>7}" for cell in cells)


def explain(resolved: Resolved, key: str) -> str:
    """Where a value comes from, and what it was derived from, down to what somebody set.

    Raises:
        UsageError: the key is a section, or there is no such key.
    """
    key = unaliased(key)
    _require_key(resolved, key)
    target = target_module(resolved.spec.target)
    sources = {derivation.key: derivation.sources for derivation in target.DERIVED}
    told: set[str] = set()
    lines = list(_account(resolved, key, sources, told))

    # The script may read another value from the plan than the spec has.
    text = config_text(target.config(resolved.values))
    reading = target.read_back(resolved.values, text)
    if reading is None or not _reads_another(reading, key, resolved.values[key]):
        return "\n".join(lines)
    had = json.dumps(reading[key])
    field = catalogue(resolved.spec.target).field(key) or {}
    source = field.get("x-overwritten-by")
    if source:
        lines.append(f"upstream has {had}: {source} is copied over it")
        lines += _account(resolved, source, sources, told, depth=1)
    else:
        lines.append(f"upstream has {had}: it fills in what is null")
    return "\n".join(lines)


def _require_key(resolved: Resolved, key: str) -> None:
    """Refuse what is no key of a value.

    Raises:
        UsageError: the key is a section, or there is no such key.
    """
    known = catalogue(resolved.spec.target).fields(key)
    if known:
        some = ", ".join(f"{key}.{name}" for name in known[:3])
        raise UsageError(f"--why {key}: that is a section; name one of its keys: {some}, ...")
    if key in resolved.values:
        return
    section, _, name = key.rpartition(".")
    meant = meant_key(name, section, resolved.spec.target)
    hint = "dfmspec schema experiment lists them"
    if meant:
        hint = f"did you mean {meant}?"
    raise UsageError(f"--why {key}: there is no such key; {hint}")


def _account(
    resolved: Resolved,
    key: str,
    sources: Mapping[str, Sequence[str]],
    told: set[str],
    depth: int = 0,
) -> Iterator[str]:
    """The lines that tell where a value comes from, then its sources, one level deeper.

    Args:
        resolved: the configuration.
        key: whose value is told.
        sources: the keys that a derived value follows from.
        told: the derived keys whose sources have been told already; grows.
        depth: how far the lines are indented.
    """
    indent = "  " * depth
    origin = resolved.origins[key]
    value = json.dumps(resolved.values[key])
    place = _where(origin)
    yield f"{indent}{key} = {value}  {place}"

    # The values of the layers under it, the lowest first.
    under = resolved.spec.under.get(key)
    if under:
        highest = (resolved.spec.values[key], resolved.spec.origins[key])
        shown = " < ".join(_layer(*layer) for layer in (*under, highest))
        yield f"{indent}  layers: {shown}"

    if origin.layer == "derived" and key not in told:
        told.add(key)
        for source in sources.get(key, ()):
            yield from _account(resolved, source, sources, told, depth + 1)


def _layer(value: Any, origin: Origin) -> str:
    """A value and the layer that it is from."""
    shown = json.dumps(value)
    place = _where(origin)
    return f"{shown} ({place})"


def _where(origin: Origin) -> str:
    """The layer that a value is from, and the place in it."""
    if origin.layer == "default":
        return origin.layer
    place = origin.note if origin.layer == "derived" else str(origin.span)
    if origin.note and origin.layer != "derived":
        place += f", {origin.note}"
    return f"{origin.layer}: {place}" if place else origin.layer


def _reads_another(reading: Reading, key: str, value: Any) -> bool:
    """Whether a target's script has the key, with another value."""
    section, _, name = key.rpartition(".")
    fields = reading.tree.get(section) or {}
    return name in fields and reading[key] != value
