"""What differs between two plans: key by key, grouped by what a difference changes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dfmspec.plan.plan import Plan
from dfmspec.targets import target_module

NUMBERS, PLACES, TALK = "changes the numbers", "changes where it runs (the same numbers, up to rounding)", "does not change the numbers"
_TALKING = ("logger", "profiling", "launcher", "straggler", "nvrx_straggler", "tokenizer")
_QUIET_KEYS = {
    "checkpoint.save", "checkpoint.save_interval", "checkpoint.most_recent_k", "checkpoint.async_save", "cluster.master_addr", "cluster.master_port",
    "dist.distributed_timeout_minutes", "run.output_dir", "run.num_samples", "train.exit_interval", "train.exit_duration_in_mins", "train.manual_gc",
    "train.manual_gc_interval", "name",
}  # fmt: skip
_ENVIRONMENT = (
    (re.compile(r"NVTE_.*|NCCL_ALGO|.*TF32.*"), NUMBERS),
    (re.compile(r"NCCL_DEBUG.*|WANDB_.*|MASTER_.*|TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"), TALK),
)  # fmt: skip
"""What variables of a name change; any other may change the order of sums."""
_LAYOUT = {
    "cluster.nnodes", "cluster.nproc_per_node", "cluster.gpu", "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size", "model.context_parallel_size", "model.sequence_parallel", "nnodes", "command",
}  # fmt: skip


class Difference(NamedTuple):
    """One key that is not the same."""

    group: str
    key: str
    one: Any
    other: Any


def differences(one: Plan, other: Plan) -> list[Difference]:
    """Every key whose value differs, the weightiest group first; a layout is no mere place for a target whose layouts do not agree."""
    flat = [_flat(plan) for plan in (one, other)]
    absent = "(absent)"
    found = []
    for key in sorted(flat[0].keys() | flat[1].keys()):
        values = [each.get(key, absent) for each in flat]
        if values[0] != values[1]:
            found.append(Difference(_group(key, one.target), key, *values))
    return sorted(found, key=lambda difference: ((NUMBERS, PLACES, TALK).index(difference.group), difference.key))


def _group(key: str, target: str) -> str:
    section, _, name = key.partition(".")
    if section == "env":
        return next((group for pattern, group in _ENVIRONMENT if pattern.fullmatch(name)), PLACES)
    if key == "launcher.setup":
        return PLACES
    layouts_agree = target_module(target).LAYOUTS_AGREE
    if key == "dataset.num_workers":
        return TALK if layouts_agree else NUMBERS
    if key in _LAYOUT:
        return PLACES if layouts_agree else NUMBERS
    return TALK if key in _QUIET_KEYS or section in _TALKING else NUMBERS


def _flat(plan: Plan) -> dict[str, Any]:
    flat: dict[str, Any] = {"target": plan.target, "name": plan.name, "nnodes": plan.nnodes, "command": " ".join(map(plan.seen, plan.command))}
    launcher = {key: value for key, value in plan.launcher.items() if key != "env"}
    for section, node in {**plan.config, "env": plan.env, "launcher": launcher, "run": plan.run}.items():
        flat |= {f"{section}.{key}": plan.seen(value) for key, value in node.items()} if isinstance(node, Mapping) else {section: node}
    return flat


def described(found: list[Difference]) -> str:
    """For a reader."""
    lines: list[str] = []
    for group in (NUMBERS, PLACES, TALK):
        inside = [difference for difference in found if difference.group == group]
        if inside:
            lines += [f"{group}:", *(f"  {d.key}: {json.dumps(d.one)} -> {json.dumps(d.other)}" for d in inside)]
    return "\n".join(lines) or "no difference"
