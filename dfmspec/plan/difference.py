"""What differs between two plans: key by key, grouped by what a difference changes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dfmspec.plan.plan import Plan
from dfmspec.targets import target_module

NUMBERS = "changes the numbers"
PLACES = "changes where it runs (the same numbers, up to rounding)"
TALK = "does not change the numbers"
_GROUPS = (NUMBERS, PLACES, TALK)
"""The weightiest first."""

_TALKING = ("logger", "profiling", "launcher", "straggler", "nvrx_straggler", "tokenizer")
"""Sections of which no key changes the numbers."""
_QUIET_KEYS = {
    "checkpoint.async_save",
    "checkpoint.most_recent_k",
    "checkpoint.save",
    "checkpoint.save_interval",
    "cluster.master_addr",
    "cluster.master_port",
    "dist.distributed_timeout_minutes",
    "name",
    "run.num_samples",
    "run.output_dir",
    "train.exit_duration_in_mins",
    "train.exit_interval",
    "train.manual_gc",
    "train.manual_gc_interval",
}
"""Keys of other sections that do not change the numbers."""
_ENVIRONMENT = (
    (re.compile(r"NVTE_.*|NCCL_ALGO|.*TF32.*"), NUMBERS),
    (re.compile(r"NCCL_DEBUG.*|WANDB_.*|MASTER_.*|TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"), TALK),
)
"""What variables of a name change; any other may change the order of sums."""
_LAYOUT = {
    "cluster.gpu",
    "cluster.nnodes",
    "cluster.nproc_per_node",
    "command",
    "model.context_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.tensor_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "nnodes",
}
"""Keys that say how the ranks are arranged."""
_ABSENT = "(absent)"


class Difference(NamedTuple):
    """One key that is not the same."""

    group: str
    key: str
    one: Any
    other: Any


def differences(one: Plan, other: Plan) -> list[Difference]:
    """Every key whose value differs, the weightiest group first.

    A layout is no mere place for a target whose layouts do not agree.
    """
    values = _flat(one)
    other_values = _flat(other)
    found = []
    for key in sorted(values.keys() | other_values.keys()):
        value = values.get(key, _ABSENT)
        other_value = other_values.get(key, _ABSENT)
        # A key of a later version is left out.
        is_newer = key.startswith("launcher.") and _is_newer(value, other_value)
        if value != other_value and not is_newer:
            found.append(Difference(_group(key, one.target), key, value, other_value))
    return sorted(found, key=lambda difference: (_GROUPS.index(difference.group), difference.key))


def _is_newer(value: Any, other: Any) -> bool:
    """Whether one plan has a key, and nothing in it, that the other one's version did not know."""
    return _ABSENT in (value, other) and any(each in (None, [], {}) for each in (value, other))


def _group(key: str, target: str) -> str:
    """What a difference of a key changes."""
    section, _, name = key.partition(".")
    if section == "env":
        return _group_of_variable(name)
    if key == "launcher.setup":
        return PLACES

    # How the work is shared out changes the order of sums, or more.
    layouts_agree = target_module(target).LAYOUTS_AGREE
    if key == "dataset.num_workers":
        return TALK if layouts_agree else NUMBERS
    if key in _LAYOUT:
        return PLACES if layouts_agree else NUMBERS

    if key in _QUIET_KEYS or section in _TALKING:
        return TALK
    return NUMBERS


def _group_of_variable(name: str) -> str:
    """What a difference of an environment variable changes."""
    for pattern, group in _ENVIRONMENT:
        if pattern.fullmatch(name):
            return group
    return PLACES


def _flat(plan: Plan) -> dict[str, Any]:
    """Every value of a plan by its key; paths as seen from the working directory."""
    launcher = {key: value for key, value in plan.launcher.items() if key != "env"}  # it is in plan.env
    sections = {**plan.config, "env": plan.env, "launcher": launcher, "run": plan.run}
    flat: dict[str, Any] = {
        "target": plan.target,
        "name": plan.name,
        "nnodes": plan.nnodes,
        "command": " ".join(map(plan.seen, plan.command)),
    }
    for section, node in sections.items():
        if not isinstance(node, Mapping):
            flat[section] = node
            continue
        for key, value in node.items():
            flat[f"{section}.{key}"] = plan.seen(value)
    return flat


def described(found: list[Difference]) -> str:
    """The differences for a reader, group by group."""
    lines: list[str] = []
    for group in _GROUPS:
        inside = [difference for difference in found if difference.group == group]
        if inside:
            lines.append(f"{group}:")
            lines += [_line(difference) for difference in inside]
    return "\n".join(lines) or "no difference"


def _line(difference: Difference) -> str:
    """A difference for a reader."""
    one = json.dumps(difference.one)
    other = json.dumps(difference.other)
    return f"  {difference.key}: {one} -> {other}"
