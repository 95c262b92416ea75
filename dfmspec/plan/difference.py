"""What differs between two plans: key by key, grouped by what a difference changes; or what two targets make of one."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

from dfmspec.plan.deviations import met
from dfmspec.plan.plan import Plan
from dfmspec.spec.paths import RUN_DIR, RUN_DIR_UPSTREAM
from dfmspec.targets import TARGETS, catalogue, target_module

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
    "run.git",
    "run.group",
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
_NOT_TRAINED_BY = ("cluster", "launcher", "run")
"""Sections that say where and how, and not what is trained."""


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
        is_newer = key.startswith(("launcher.", "run.")) and _is_newer(key, value, other_value, one.target)
        if value != other_value and not is_newer:
            found.append(Difference(_group(key, one.target), key, value, other_value))
    return sorted(found, key=lambda difference: (_GROUPS.index(difference.group), difference.key))


def _is_newer(key: str, value: Any, other: Any, target: str) -> bool:
    """Whether one plan has a key, and no more than its default in it, that the other one's version did not know."""
    default = (catalogue(target).field(key) or {}).get("default")
    return _ABSENT in (value, other) and any(each in (None, [], {}, default) for each in (value, other))


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


def in_markdown(found: list[Difference], name: str) -> str:
    """The differences for a pull request: a table, what changes the numbers first."""
    if not found:
        return f"**{name}**: the plan is the same"
    counts = []
    for group in _GROUPS:
        count = sum(difference.group == group for difference in found)
        if count:
            counts.append(f"{group}: {count}")
    rows = ["| key | was | is | |", "|---|---|---|---|"]
    for difference in found:
        cells = [f"`{difference.key}`", *(_cell(value) for value in (difference.one, difference.other))]
        rows.append(f"| {' | '.join(cells)} | {difference.group} |")
    return "\n".join([f"**{name}**: {'; '.join(counts)}", "", *rows])


def _cell(value: Any) -> str:
    """A value in a table of Markdown, whatever is in it."""
    text = value if value == _ABSENT else json.dumps(value)
    shown = text.replace("|", "\\|")
    fence = "``" if "`" in shown else "`"
    return f"{fence}{shown}{fence}" if fence == "`" else f"{fence} {shown} {fence}"


def _line(difference: Difference) -> str:
    """A difference for a reader."""
    one = json.dumps(difference.one)
    other = json.dumps(difference.other)
    return f"  {difference.key}: {one} -> {other}"


# Of two targets, nearly every key differs: told by what each has.


def across_targets(one: Plan, other: Plan) -> str:
    """What a spec means to two targets, for a reader: keys that only one has, other values, and what they do otherwise.

    The weightiest comes last, after lists of keys that are longer than a terminal. Keys of the machine, of the launcher
    and of the environment are left out.
    """
    sections = []
    values, other_values = (_trained_by(plan) for plan in (one, other))
    for plan, mine, others in ((one, values, other_values), (other, other_values, values)):
        alone = sorted(mine.keys() - others.keys())
        if alone:
            sections.append([f"only {plan.target} has ({len(alone)} keys):", *_by_section(alone)])
    both = sorted(values.keys() & other_values.keys())
    differing = [key for key in both if values[key] != other_values[key]]
    if differing:
        lines = [_line(Difference(NUMBERS, key, values[key], other_values[key])) for key in differing]
        sections.append(["both have, with other values:", *lines])
    deviations = _deviations(one, other, values, other_values)
    if deviations:
        sections.append(deviations)
    head = f"target: {one.target} -> {other.target}"
    return "\n\n".join([head, *("\n".join(lines) for lines in sections)])


def _trained_by(plan: Plan) -> dict[str, Any]:
    """What a target is given, by key; the run directory under one name."""
    found = {}
    for key, value in _flat(plan).items():
        section = key.partition(".")[0]
        if section not in plan.config or section in _NOT_TRAINED_BY:
            continue
        found[key] = value.replace(RUN_DIR_UPSTREAM, RUN_DIR) if isinstance(value, str) else value
    return found


def _by_section(keys: list[str]) -> list[str]:
    """`section: key, key`, in lines of a terminal's width."""
    lines = []
    for section, inside in groupby(keys, key=lambda key: key.partition(".")[0]):
        names = ", ".join(key.partition(".")[2] for key in inside)
        lines += textwrap.wrap(
            f"{section}: {names}", 78, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


def _deviations(one: Plan, other: Plan, values: Mapping[str, Any], other_values: Mapping[str, Any]) -> list[str]:
    """What the two programs do otherwise with what they are given, where that is known: of the same network."""
    networks = {TARGETS[plan.target].network for plan in (one, other)}
    owners = [target_module(plan.target).OWN for plan in (one, other)]
    if networks != {"dit"} or owners[0] == owners[1]:
        return []
    lines = ["what they do differently (docs/deviations.md says why):"]
    for deviation in met(values if owners[0] else other_values):
        there, here = _plain(deviation.there), _plain(deviation.here)
        change = f"{here} -> {there}" if owners[0] else f"{there} -> {here}"
        text = f"{deviation.subject}: {change}"
        lines += textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return lines


def _plain(markdown: str) -> str:
    """A text without its links."""
    return re.sub(r"\s*\(\[[^]]*\]\([^)]*\)\)", "", markdown)
