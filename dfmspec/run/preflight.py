"""What is looked at before anything starts: the packages that the ranks will find, the code at its revision, versions
that go together, driver and GPUs.

Under launcher local it happens here, before a dataset is drawn or a run directory made; elsewhere each node does it
first, and one that lacks something ends the attempt. The checks themselves are in probe.py, which travels.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfmspec.errors import PreflightError
from dfmspec.files import write_aside
from dfmspec.plan.containers import engine_of
from dfmspec.plan.environment import inherited, shell_line
from dfmspec.plan.plan import Plan
from dfmspec.plan.scripts import PREFLIGHT_SCRIPT, root_of
from dfmspec.record.answers import told
from dfmspec.record.files import read_json
from dfmspec.record.run_dir import ANSWER, RunDir
from dfmspec.targets import target_module

_SECONDS = 60
"""The most that it may take."""
_PROBE_FILE = Path(__file__).with_name("probe.py")
RANK_FILE = Path(__file__).with_name("rank.py")
"""What stands between torchrun and a script that knows nothing of a supervisor."""
PROBE = "probe.py"
_TIMED_OUT = 124
"""What `timeout` ends with."""
_TOO_LONG = {
    "check": "time",
    "place": "this node",
    "is": f"looking at the packages of the ranks took more than {_SECONDS} s, as on a cold shared disk",
    "needed": f"{_SECONDS} s at most",
    "way_out": "try again, or leave it out with --preflight off",
}
"""The fault of a look that does not end."""
QUESTION = ANSWER
"""In a run directory, what a node is asked; its answer has the same name in the node's own folder."""
_DISTRIBUTIONS = (
    *("torch", "megatron-core", "megatron-bridge", "megatron-energon", "multi-storage-client"),
    *("transformer-engine", "transformers", "diffusers", "nvidia-resiliency-ext", "numpy"),
)
"""Whose versions a run writes down."""


@dataclass(frozen=True)
class Preflight:
    """How much is looked at."""

    level: str = "quick"
    """off or quick."""
    any_revision: bool = False
    """Another revision of the target's code is accepted, and written down."""


LEVELS = ("off", "quick")
_SECOND_LINE = shlex.quote(r"""2s/^'''exec' "\{0,1\}\([^"]*[^" ]\)"\{0,1\} .*/\1/p""")
"""sed's program for the interpreter of a script whose own name is too long, or has spaces, for the first line."""


def question(plan: Plan, wanted: Preflight, *, root: str | None = None) -> dict[str, Any]:
    """What a node is asked.

    Args:
        plan: the plan.
        wanted: how much is looked at.
        root: where the code of a script is; None: the node's variable says.
    """
    upstream = target_module(plan.target).UPSTREAM
    asked: dict[str, Any] = {
        "modules": {"torch": "pip install 'dfmspec[train]'", "megatron.core": "pip install 'dfmspec[train]'"},
        "distributions": list(_DISTRIBUTIONS),
        "sources": [],
        "together": [],
        "gpus": plan.gpus_per_node,
        "any_revision": wanted.any_revision,
        "torchrun_options": list(plan.launcher.get("torchrun_options") or ()),  # which earlier plans do not have
    }
    if upstream is None:
        return asked
    asked["modules"] = {"torch": "set launcher.python to the interpreter that has it, or install it there"}
    asked["root"] = root or root_of(plan, upstream)
    asked["variable"] = upstream.variable
    asked["sources"] = [source._asdict() for source in upstream.sources]
    is_mock = "--mock" in plan.command
    asked["together"] = [rule._asdict() for rule in upstream.together if not (rule.with_data and is_mock)]
    return asked


def interpreter_lines(plan: Plan) -> list[str]:
    """Lines of the shell that set `python` to the interpreter that torchrun will have."""
    named = plan.launcher.get("python")
    if named is not None:
        return [f"python={shlex.quote(named)}"]
    return [
        'torchrun="$(command -v torchrun || true)"',
        'if [ -z "$torchrun" ]; then echo "error: torchrun is not found on PATH ($PATH); set launcher.python to the '
        'interpreter that has torch, or PATH in launcher.setup" >&2; exit 4; fi',
        """python="$(sed -n '1s/^#! *//p' "$torchrun")" """.rstrip(),
        'python="${python#/usr/bin/env }"',
        'python="${python%% *}"  # without options',
        f'case "$python" in */sh) python="$(sed -n {_SECOND_LINE} "$torchrun")" ;; esac',
        'case "$python" in *python*) ;; *) python=python3 ;; esac',
    ]


def write_preflight(plan: Plan, wanted: Preflight, run: RunDir) -> None:
    """Leave in a run directory what each node looks at first; or nothing, where nothing is to be looked at."""
    script = run.path / PREFLIGHT_SCRIPT
    if wanted.level == "off":
        script.unlink(missing_ok=True)
        return
    write_aside(run.path / PROBE, _PROBE_FILE.read_text(encoding="utf-8"))
    write_aside(run.path / QUESTION, json.dumps(question(plan, wanted), indent=2) + "\n")
    write_aside(script, _script(plan))


def _script(plan: Plan) -> str:
    """What a node runs, with its number; the code's place is filled in from its own variables."""
    upstream = target_module(plan.target).UPSTREAM
    answer = f'"$DFMSPEC_ATTEMPT_DIR/node$1/{QUESTION}"'
    asked = f'"$DFMSPEC_RUN_DIR/{QUESTION}"'
    lines = [
        "#!/usr/bin/env bash",
        "# what a node looks at before it starts anything: bash preflight.sh NODE",
        "set -euo pipefail",
        'mkdir -p "$DFMSPEC_ATTEMPT_DIR/node$1"',
        *interpreter_lines(plan),
    ]
    root = "" if upstream is None else f' "${upstream.variable}"'
    late = shlex.quote(json.dumps({"faults": [_TOO_LONG]}))
    lines += [
        "code=0",
        f'timeout {_SECONDS} "$python" "$DFMSPEC_RUN_DIR/{PROBE}" {asked} {answer}{root} || code=$?',
        f'if [ "$code" = {_TIMED_OUT} ]; then echo {late} > {answer}; exit 4; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def look_here(plan: Plan, wanted: Preflight) -> dict[str, Any]:
    """Look at this machine as its ranks will find it: the answer of probe.py.

    Raises:
        PreflightError: something is missing, with all that is.
    """
    if wanted.level == "off":
        return {}
    engine = engine_of(plan)
    if engine is not None:  # what is in the container is looked at there
        _require_engine(plan, engine)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / QUESTION
        answer = Path(folder) / "answer.json"
        asked.write_text(json.dumps(question(plan, wanted, root=root_here(plan))))
        lines = [
            "set -eo pipefail",
            *plan.launcher["setup"],
            *(shell_line(name, value) for name, value in environment_here(plan).items()),
            *interpreter_lines(plan),
            f'exec timeout {_SECONDS} "$python" ' + shlex.join([str(_PROBE_FILE), str(asked), str(answer)]),
        ]
        around = {**inherited(os.environ, nnodes=plan.nnodes), "PATH": path_here()}
        done = subprocess.run(["bash", "-c", "\n".join(lines)], env=around, capture_output=True, text=True, check=False)
        try:
            found = read_json(answer)
        except (OSError, ValueError):
            said = done.stderr.strip() or f"the interpreter ended with {done.returncode}"
            raise PreflightError(told(_TOO_LONG) if done.returncode == _TIMED_OUT else _unprefixed(said)) from None
    if found["faults"]:
        raise PreflightError("\n".join(told(fault) for fault in found["faults"]))
    return found


def _require_engine(plan: Plan, engine: str) -> None:
    """See that what runs a container is here, where launcher.setup does not bring it.

    Raises:
        PreflightError: it is not.
    """
    if shutil.which(engine) is None and not plan.launcher["setup"]:
        raise PreflightError(
            f"{engine} is not found on PATH, and runs launcher.container; install it, load it in launcher.setup, "
            "or name another with launcher.container_engine"
        )


def _unprefixed(text: str) -> str:
    """The last line of an error, without its first word."""
    return text.splitlines()[-1].removeprefix("error: ")


def path_here() -> str:
    """PATH with this dfmspec's programs first, as in a virtual environment that is activated."""
    programs = str(Path(sys.executable).parent)
    return os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])


def root_here(plan: Plan) -> str | None:
    """Where the code of a script is on this machine; None: it is this package's."""
    upstream = target_module(plan.target).UPSTREAM
    if upstream is None:
        return None
    return os.environ.get(upstream.variable) or root_of(plan, upstream)


def environment_here(plan: Plan) -> dict[str, str | None]:
    """The variables of the plan's, and of a script's code, for processes of this machine."""
    found: dict[str, str | None] = dict(plan.env)
    upstream = target_module(plan.target).UPSTREAM
    root = root_here(plan)
    if upstream is not None and root is not None:
        inherited_path = found.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        found[upstream.variable] = root
        found["PYTHONPATH"] = os.pathsep.join(path for path in (root, inherited_path) if path)
    return found
