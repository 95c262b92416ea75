"""A plan as shell: the command of a node for readers, and the script of a node, which runs where it lies."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping, Sequence

from dfmspec.plan.containers import entering, outside
from dfmspec.plan.environment import patience, shell_line, unset_lines
from dfmspec.plan.plan import RANK, Plan, Role, Word
from dfmspec.plan.secrets import shell_lines
from dfmspec.plan.shell import shell_path
from dfmspec.spec.paths import PLAN_ID, is_relative
from dfmspec.targets import Upstream, target_module

RANK_PROGRAM = "rank.py"
"""In a bundle, what a rank of another's script is at first, where a supervisor looks after it."""
PREFLIGHT_SCRIPT = "preflight.sh"
"""In a run directory, what a node looks at before it starts anything."""
MASTER_PORT = "DFMSPEC_MASTER_PORT"
"""The variable in which a launcher tells a single node its port."""
_ONE_NODE = (
    f'[ -z "${{{MASTER_PORT}:-}}" ] || export PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT="${MASTER_PORT}"'
    "  # else it is always 29500"
)
SCRIPT_A_NODE = 32
"""Up to so many nodes, each has its own script; beyond, they share one that takes the rank."""
_BUNDLE = '"$DFMSPEC_BUNDLE"/'
_BASE = '"$DFMSPEC_BASE"/'


def shell_command(words: Sequence[Word], places: Mapping[Role, str] | None = None) -> str:
    """A command over several lines, as the how-to writes it; the variables stay variables.

    Args:
        words: torchrun's and the script's.
        places: what stands before files by their role, or for the program, as the shell writes it.
    """
    quoted = [_quoted(word, places or {}) for word in words]

    # The program and its first flag, then a flag with its value a line.
    lines = [" ".join(quoted[:3])]
    rest = quoted[3:]
    while rest:
        taken = 2 if _has_value(rest) else 1
        lines.append(" ".join(rest[:taken]))
        rest = rest[taken:]
    return " \\\n    ".join(lines)


def _has_value(words: Sequence[str]) -> bool:
    """Whether the first word is a flag and the second its value."""
    if len(words) == 1 or "=" in words[0]:
        return False
    return words[0].startswith("--") and not words[1].startswith("--")


def _quoted(word: Word, places: Mapping[Role, str]) -> str:
    """A word as the shell takes it for one, whatever is in it."""
    if word.role is Role.VARIABLE:
        return f'"{word.text}"'
    if word.role is Role.PATH:
        return shell_path(word.text)
    if word.role is Role.PROGRAM:
        return places.get(word.role) or shlex.quote(word.text)
    return places.get(word.role, "") + shlex.quote(word.text)


def torchrun_words(plan: Plan, found: str = "torchrun") -> list[str]:
    """How torchrun is started: by the interpreter that a spec names, or as it is `found`."""
    python = plan.launcher.get("python")  # which earlier plans do not have
    return [found] if python is None else [python, "-m", "torch.distributed.run"]


def where(plan: Plan, base: str) -> list[str]:
    """Lines that find the folders of a plan, unless the caller has said them.

    Args:
        plan: the plan.
        base: what relative paths that nobody named are relative to, as the shell writes it.
    """
    lines = [f'export DFMSPEC_BASE="${{DFMSPEC_BASE:-{base}}}"']

    # The spec's folder, as the bundle sees it.
    if plan.spec_dir is not None:
        spec_dir = _BUNDLE + shlex.quote(plan.spec_dir)
        export = _unless_set("DFMSPEC_SPEC_DIR")
        lines.append(f"{export}{spec_dir}  # paths of the spec are relative to this")

    # The run directory of a bundle that is started by hand has the plan's id for a name.
    output_dir = shell_path(plan.run["output_dir"])
    if is_relative(plan.run["output_dir"]):
        output_dir = _BASE + output_dir
    run_dir = f"{output_dir}/{plan.name}/{plan.short_id}"
    export = _unless_set("DFMSPEC_RUN_DIR")
    lines.append(f"{export}{run_dir}  # checkpoints and logs; the same on every node")
    return lines


def _unless_set(name: str) -> str:
    """The left side of an assignment.

    The value may have quotes of its own, which a default inside quotes may not.
    """
    return f'[ -n "${{{name}:-}}" ] || export {name}='


def node_script(plan: Plan, node: int | None) -> str:
    """The script of a node, or (None) the one for all, which takes the rank.

    It runs from any working directory, without dfmspec on the launch host.
    """
    which = f"any of {plan.nnodes} nodes" if node is None else f"node {node} of {plan.nnodes}"
    shebang, comment, strict = heading(f"{plan.name}: {which}; plan {plan.short_id}")
    lines = [
        shebang,
        comment,
        "# shellcheck disable=SC1091,SC2016  # files of the nodes; words of a spec stay as they are",
        strict,
        *unset_lines(plan.nnodes),
        *outside(plan, plan.launcher["setup"]),
        "set -u",
    ]

    # The plan's variables stand before what the script sets, which they so cannot undo.
    lines += [shell_line(name, value) for name, value in plan.env.items()]
    lines += outside(plan, shell_lines(plan.secrets))
    for name, value in patience(plan.env).items():
        lines.append(f"{shell_line(name, value)}  # torchrun waits so long for ranks that save")
    if node is None:
        rank = RANK.removeprefix("$")
        lines.append(f'{rank}="${{1:?give the rank of this node, 0 to {plan.nnodes - 1}}}"')
    lines.append('DFMSPEC_BUNDLE=$(CDPATH="" cd -- "$(dirname -- "$0")" > /dev/null && pwd)')
    lines += where(plan, "$PWD")
    lines.append(f"export {PLAN_ID}={plan.recorded_id}  # checkpoints say whose they are")
    lines.append('mkdir -p "$DFMSPEC_RUN_DIR"')
    lines += entering(plan, node, 'node.sh "$NODE_RANK"' if node is None else f"node{node}.sh")
    lines += _of_the_run(plan)

    # The packages of a checkout, what is looked at first, and the command.
    places = {Role.PROGRAM: shlex.join(torchrun_words(plan)), Role.SCRIPT: _BUNDLE, Role.CONFIG: _BUNDLE}
    upstream = target_module(plan.target).UPSTREAM
    if upstream is not None:
        root = f'"${upstream.variable}"'
        rank = f"${{DFMSPEC_ATTEMPT_DIR:+{_BUNDLE}{RANK_PROGRAM}}}"
        places[Role.SCRIPT] = f"{rank} {root}/"
        lines += _checkout(plan, upstream)
        lines += [
            f"{shell_line(name, value)}  # it is made, and {RANK_PROGRAM} installs it"
            for name, value in handler(plan).items()
        ]
    number = f'"{RANK}"' if node is None else str(node)
    preflight = f'"$DFMSPEC_RUN_DIR"/{PREFLIGHT_SCRIPT}'
    lines.append(f"[ ! -e {preflight} ] || bash {preflight} {number}  # of dfmspec run")
    command = shell_command(plan.words(node), places)
    lines.append(f"exec {command}")
    return "\n".join(lines) + "\n"


def stops_by(plan: Plan) -> int | None:
    """The signal on which a script saves and stops; None: on none."""
    train = plan.config["train"]
    if not train.get("exit_signal_handler"):
        return None
    return int(train.get("exit_signal") or signal.SIGTERM)


def handler(plan: Plan) -> dict[str, str]:
    """The variable by which what runs a rank installs its script's handler of a signal."""
    upstream = target_module(plan.target).UPSTREAM
    if upstream is None or stops_by(plan) is None:
        return {}
    return {"DFMSPEC_HANDLER": upstream.handler}


def root_of(plan: Plan, upstream: Upstream) -> str:
    """Where the code of a script is, where its variable does not say."""
    root: str | None = plan.launcher.get("root")  # which earlier plans do not have
    return root or upstream.root


def _checkout(plan: Plan, upstream: Upstream) -> list[str]:
    """Lines that find the code of a script that this package does not bring."""
    variable = upstream.variable
    root = shlex.quote(root_of(plan, upstream))
    return [
        f"{_unless_set(variable)}{root}  # where {upstream.name} is",
        f'export PYTHONPATH="${variable}${{PYTHONPATH:+:$PYTHONPATH}}"  # for the packages of its checkout',
    ]


def _of_the_run(plan: Plan) -> list[str]:
    """Lines for what one run's processes agree on: its id at Weights & Biases, and where its nodes meet."""
    lines = []
    if "WANDB_RESUME" in plan.env and "WANDB_RUN_ID" not in plan.env:
        lines.append(f'export WANDB_RUN_ID="${{WANDB_RUN_ID:-{plan.name}-{plan.short_id}}}"')
    if plan.nnodes == 1:
        return [*lines, _ONE_NODE]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in plan.env:
            lines.append(f': "${{{name}:?set {name} to that of node 0}}"')
    if plan.launcher["rendezvous"] == "c10d":
        lines.append(f'DFMSPEC_RDZV_ID="${{DFMSPEC_RDZV_ID:-{plan.short_id}}}"')
    return lines


def heading(words: str) -> list[str]:
    """The first lines of a script."""
    return ["#!/usr/bin/env bash", f"# {words}", "set -eo pipefail"]


def script_names(plan: Plan) -> dict[str, int | None]:
    """The scripts of a bundle, and the node of each; None: of any."""
    if plan.nnodes > SCRIPT_A_NODE:
        return {"node.sh": None}
    return {f"node{node}.sh": node for node in range(plan.nnodes)}


def script_of(plan: Plan, node: int) -> list[str]:
    """The script of one node, and its arguments."""
    if plan.nnodes > SCRIPT_A_NODE:
        return ["node.sh", str(node)]
    return [f"node{node}.sh"]
