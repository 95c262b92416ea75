"""A plan as shell: the command of a node for readers, and the script of a node, which runs where it lies."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from dfmspec.plan.environment import shell_line
from dfmspec.plan.plan import RANK, Plan, Role, Word
from dfmspec.spec.paths import SPEC_DIR, is_relative
from dfmspec.targets import target_module

SCRIPT_A_NODE = 32
"""Up to so many nodes, each has its own script; beyond, they share one that takes the rank."""


def shell_command(words: Sequence[Word], places: Mapping[Role, str] | None = None) -> str:
    """A command over several lines, as the how-to writes it; the variables stay variables. places: folders of files, as the shell writes them."""
    quoted = [_quoted(word, places or {}) for word in words]
    first, rest = quoted[:3], quoted[3:]
    lines, i = [" ".join(first)], 0
    while i < len(rest):
        pair = rest[i].startswith("--") and i + 1 < len(rest) and not rest[i + 1].startswith("--")
        lines.append(" ".join(rest[i : i + 2]) if pair else rest[i])
        i += 2 if pair else 1
    return " \\\n    ".join(lines)


def _quoted(word: Word, places: Mapping[Role, str]) -> str:
    if word.role is Role.VARIABLE:
        return f'"{word.text}"'
    return shell_path(word.text) if word.role is Role.PATH else places.get(word.role, "") + shlex.quote(word.text)


def shell_path(path: str) -> str:
    """A path of a plan as a script writes it."""
    start, place = next(((start, place) for start, place in _STARTS if path.startswith(start)), ("", ""))
    return place + shlex.quote(path.removeprefix(start))


_STARTS = ((f"{SPEC_DIR}/", '"$DFMSPEC_SPEC_DIR"/'), ("~/", '"$HOME"/'))


def where(plan: Plan, base: str) -> list[str]:
    """Lines that find the folders of a plan, unless the caller has said them; base: what relative paths that nobody named are relative to."""
    lines = [f'export DFMSPEC_BASE="${{DFMSPEC_BASE:-{base}}}"']
    if plan.spec_dir is not None:
        lines.append(f"{_unless_set('DFMSPEC_SPEC_DIR')}\"$DFMSPEC_BUNDLE\"/{shlex.quote(plan.spec_dir)}  # paths of the spec are relative to this")
    output_dir = ('"$DFMSPEC_BASE"/' if is_relative(plan.run["output_dir"]) else "") + shell_path(plan.run["output_dir"])
    lines.append(f"{_unless_set('DFMSPEC_RUN_DIR')}{output_dir}/{plan.name}/{plan.plan_id[:12]}  # checkpoints and logs; the same on every node")
    return lines


def _unless_set(name: str) -> str:
    """The left side of an assignment; the value may have quotes of its own, which a default inside quotes may not."""
    return f'[ -n "${{{name}:-}}" ] || export {name}='


def node_script(plan: Plan, node: int | None) -> str:
    """The script of a node, or (None) the one for all, which takes the rank: from any working directory, without dfmspec on the launch host."""
    which = f"node {node} of {plan.nnodes}" if node is not None else f"any of {plan.nnodes} nodes"
    shebang, comment, strict = heading(f"{plan.name}: {which}; plan {plan.plan_id[:12]}")
    lines = [shebang, comment, "# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are", strict]
    lines += [*plan.launcher["setup"], "set -u"]
    lines += [shell_line(name, value) for name, value in plan.env.items()]  # before what the script sets, which it so cannot undo
    if node is None:
        lines.append(f'{RANK[1:]}="${{1:?give the rank of this node, 0 to {plan.nnodes - 1}}}"')
    lines.append('DFMSPEC_BUNDLE=$(cd "$(dirname "$0")" > /dev/null && pwd)')
    lines += [*where(plan, "$PWD"), 'mkdir -p "$DFMSPEC_RUN_DIR"']
    if "WANDB_RESUME" in plan.env and "WANDB_RUN_ID" not in plan.env:
        lines.append(f'export WANDB_RUN_ID="${{WANDB_RUN_ID:-{plan.name}-{plan.plan_id[:12]}}}"')
    if plan.nnodes > 1:
        lines += [f': "${{{name}:?set {name} to that of node 0}}"' for name in ("MASTER_ADDR", "MASTER_PORT") if name not in plan.env]
        if plan.launcher["rendezvous"] == "c10d":
            lines.append(f'DFMSPEC_RDZV_ID="${{DFMSPEC_RDZV_ID:-{plan.plan_id[:12]}}}"')
    checkout = target_module(plan.target).CHECKOUT
    if checkout is not None:
        lines.append(f'export PYTHONPATH="{checkout}${{PYTHONPATH:+:$PYTHONPATH}}"  # for the packages of its checkout')
    bundle = '"$DFMSPEC_BUNDLE"/'
    places = {Role.SCRIPT: bundle if checkout is None else f'"{checkout}"/', Role.CONFIG: bundle}
    return "\n".join([*lines, f"exec {shell_command(plan.words(node), places)}"]) + "\n"


def heading(words: str) -> list[str]:
    """The first lines of a script."""
    return ["#!/usr/bin/env bash", f"# {words}", "set -eo pipefail"]


def script_names(plan: Plan) -> dict[str, int | None]:
    """The scripts of a bundle, and the node of each; None: of any."""
    return {f"node{node}.sh": node for node in range(plan.nnodes)} if plan.nnodes <= SCRIPT_A_NODE else {"node.sh": None}


def script_of(plan: Plan, node: int) -> list[str]:
    """The script of one node, and its arguments."""
    return [f"node{node}.sh"] if plan.nnodes <= SCRIPT_A_NODE else ["node.sh", str(node)]
