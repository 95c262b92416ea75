"""From Resolved to a Plan: the files and commands of a run, byte for byte the same wherever they are made.

A plan's identity is the sha256 of its canonical JSON. What may change behind its back (dfmspec's own code, the dataset's
metadata) stands beside it as guards: a run whose guards no longer hold is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfmspec.errors import PreflightError, UsageError
from dfmspec.resolve import Resolved
from dfmspec.resources import resource
from dfmspec.targets import target_module

FORMAT_VERSION = 1
CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True)
class NodeCommand:
    """What one node runs."""

    node_rank: int
    argv: tuple[str, ...]
    """`$MASTER_ADDR` and `$MASTER_PORT` stand for the environment's values, as in the how-to."""


@dataclass(frozen=True)
class Plan:
    """Everything that a launcher needs."""

    name: str
    target: str
    config: Mapping[str, Any]
    nodes: tuple[NodeCommand, ...]
    env: Mapping[str, str]
    """Environment variables that the run needs, by rule."""
    run: Mapping[str, Any]
    """The `run` section and the launcher: where the run directory goes, how it resumes. Not part of the identity."""
    guards: Mapping[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed."""
        return {
            "format_version": FORMAT_VERSION, "name": self.name, "target": self.target, "config": self.config,
            "nodes": [list(node.argv) for node in self.nodes], "env": dict(self.env),
        }  # fmt: skip

    @property
    def plan_id(self) -> str:
        """sha256 of the identity, hexadecimal."""
        return hashlib.sha256(canonical(self.identity).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {"plan_id": f"sha256:{self.plan_id}", **self.identity, "run": dict(self.run), "guards": dict(self.guards)}


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration."""
    return "sha256:" + hashlib.sha256(canonical(config).encode()).hexdigest()


def make_plan(resolved: Resolved) -> Plan:
    """Compile a configuration without errors into a plan."""
    target = target_module(resolved.spec.target)
    values = resolved.values
    arguments = target.minimal_arguments(values, resolved.origins)
    if arguments is None:
        arguments = ["--config-file", CONFIG]
    nnodes = values["cluster.nnodes"]
    nodes = tuple(
        NodeCommand(rank, ("torchrun", *_torchrun_flags(values["cluster.nproc_per_node"], nnodes, rank), target.ENTRY, *arguments))
        for rank in range(nnodes)
    )
    run = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("run.")}
    run["launcher"] = values["launcher.kind"]
    return Plan(
        resolved.spec.name, resolved.spec.target, target.config(values), nodes, _environment(values), run, guards(values, resolved.spec.target)
    )


def _torchrun_flags(nproc: int, nnodes: int, rank: int) -> list[str]:
    """The how-to's flags, in its order."""
    flags = ["--nproc-per-node", str(nproc)]
    if nnodes > 1:
        flags += ["--nnodes", str(nnodes), "--node-rank", str(rank)]
        flags += ["--master-addr", "$MASTER_ADDR", "--master-port", "$MASTER_PORT"]
    return flags


def _environment(values: Mapping[str, Any]) -> dict[str, str]:
    env: dict[str, str] = {}
    if values["cluster.nnodes"] > 1:
        for key, name in (("cluster.master_addr", "MASTER_ADDR"), ("cluster.master_port", "MASTER_PORT")):
            if values[key] is not None:
                env[name] = str(values[key])
    if values["cluster.device"] == "cpu":
        env["OMP_NUM_THREADS"] = "1"
    elif values["model.tensor_model_parallel_size"] > 1:
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # keeps tensor-parallel collectives ahead of the kernels that hide them
    return env


def guards(values: Mapping[str, Any], target: str) -> dict[str, str]:
    """Digests of what a plan takes for granted: this version's code, and the dataset's metadata."""
    found = {"code": code_digest()} if target == "megatron_core" else {}
    path = values["dataset.path"]
    if path and (metadata := Path(path).expanduser() / ".nv-meta").is_dir():
        found["dataset"] = _digest(file for file in sorted(metadata.iterdir()) if file.suffix in (".yaml", ".json"))
    return found


def code_digest() -> str:
    """sha256 over the package's Python files."""
    return _digest(sorted(Path(__file__).parent.rglob("*.py")))


def _digest(files: Any) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()


# On disk and on screen.


def config_text(config: Mapping[str, Any]) -> str:
    """config.yaml: JSON-compatible YAML, which PyYAML, ruamel and OmegaConf read alike."""
    lines = []
    for section, node in config.items():
        if isinstance(node, Mapping):
            lines.append(f"{section}:")
            lines += [f"  {field}: {_scalar(value)}" for field, value in node.items()]
        else:
            lines.append(f"{section}: {_scalar(node)}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    text = re.sub(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}", _one_escape, json.dumps(value))
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")  # YAML 1.1 needs the point
    return text


def _one_escape(pair: re.Match[str]) -> str:
    """A surrogate pair of JSON as YAML's one escape."""
    character = json.loads('"' + pair[0] + '"')
    return f"\\U{ord(character):08X}"


def shell_command(argv: tuple[str, ...]) -> str:
    """A command over several lines, as the how-to writes it; the two variables stay variables."""
    quoted = [word if word in ("$MASTER_ADDR", "$MASTER_PORT") else shlex.quote(word) for word in argv]
    first, rest = quoted[:3], quoted[3:]
    lines, i = [" ".join(first)], 0
    while i < len(rest):
        pair = rest[i].startswith("--") and i + 1 < len(rest) and not rest[i + 1].startswith("--")
        lines.append(" ".join(rest[i : i + 2]) if pair else rest[i])
        i += 2 if pair else 1
    return " \\\n    ".join(lines)


def node_script(plan: Plan, node: NodeCommand) -> str:
    """nodeN.sh: runs where it lies, from any working directory, and needs no dfmspec on the launch host."""
    entry = target_module(plan.target).ENTRY
    lines = ["#!/usr/bin/env bash", f"# {plan.name}: node {node.node_rank} of {len(plan.nodes)}; plan {plan.plan_id[:12]}", "set -euo pipefail"]
    lines.append('here=$(cd "$(dirname "$0")" && pwd)')
    if plan.target == "megatron_core":
        lines.append('export DFMSPEC_BASE="${DFMSPEC_BASE:-$PWD}"  # relative paths of the plan are relative to this')
    lines += [f"export {name}={shlex.quote(value)}" for name, value in plan.env.items()]
    if len(plan.nodes) > 1:
        lines += [f': "${{{name}:?set {name} to that of node 0}}"' for name in ("MASTER_ADDR", "MASTER_PORT") if name not in plan.env]
    root = '"$here"/' if plan.target == "megatron_core" else '"${DFM_ROOT:-/opt/DFM}"/'
    command = shell_command(node.argv)
    for word, place in ((entry, root + entry), (CONFIG, '"$here"/' + CONFIG)):
        command = command.replace(f" {word}", f" {place}")
    return "\n".join([*lines, command]) + "\n"


def write_bundle(plan: Plan, out: Path) -> None:
    """plan.json, config.yaml, a script a node, and the entry script.

    Raises:
        UsageError: the folder exists and holds something else than this plan.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; nothing was written. Choose another folder, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan.as_json(), indent=2, sort_keys=True) + "\n")
    (out / CONFIG).write_text(config_text(plan.config))
    for node in plan.nodes:
        script = out / f"node{node.node_rank}.sh"
        script.write_text(node_script(plan, node))
        script.chmod(0o755)
    if plan.target == "megatron_core":
        entry = target_module(plan.target).ENTRY
        (out / entry).parent.mkdir(parents=True)
        (out / entry).write_bytes(resource(entry).read_bytes())


def read_bundle(folder: Path) -> Plan:
    """The plan of a bundle.

    Raises:
        PreflightError: plan.json is damaged or was edited.
    """
    try:
        stored = json.loads((folder / "plan.json").read_text())
        plan = Plan(
            stored["name"], stored["target"], stored["config"],
            tuple(NodeCommand(rank, tuple(argv)) for rank, argv in enumerate(stored["nodes"])),
            stored["env"], stored["run"], stored["guards"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreflightError(f"{folder}/plan.json cannot be read: {error}; make the plan again") from error
    if stored.get("plan_id") != f"sha256:{plan.plan_id}":
        raise PreflightError(f"{folder}/plan.json was edited: its content is not that of its plan_id; make the plan again")
    return plan
