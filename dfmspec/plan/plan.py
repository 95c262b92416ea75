"""From Resolved to a Plan: the files and commands of a run, byte for byte the same wherever they are made.

A plan's identity is the sha256 of its canonical JSON. What may change behind its back (dfmspec's own code, the dataset's
metadata) stands beside it as guards: a run whose guards no longer hold is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.data.energon_metadata import metadata_files
from dfmspec.data.metadataset import everything, is_metadataset
from dfmspec.errors import InvalidSpec
from dfmspec.plan.environment import environment
from dfmspec.read.document import write_scalar
from dfmspec.read.resolve import Resolved
from dfmspec.spec.paths import PATH_KEYS, SPEC_DIR, SPEC_DIR_UPSTREAM, is_relative, local_path
from dfmspec.targets import Reading, target_module

FORMAT_VERSION = 1

RANK, ADDR, PORT, ID = "$NODE_RANK", "$MASTER_ADDR", "$MASTER_PORT", "$DFMSPEC_RDZV_ID"
IS_HOST = "is_host=$((NODE_RANK == 0))"
"""Node 0 keeps the rendezvous, whatever name its address resolves to."""
OF_A_NODE = (RANK, IS_HOST)
VARIABLES = (*OF_A_NODE, ADDR, PORT, ID, f"{ADDR}:{PORT}")
"""Words of torchrun's flags that the environment fills in, as in the how-to."""


class Role(Enum):
    """What a word of a command stands for, by where it stands: a path of the user's may look like anything."""

    TEXT = "itself"
    PROGRAM = "torchrun"
    VARIABLE = "what the environment fills in"
    SCRIPT = "the script to train with"
    CONFIG = "the configuration's file"
    PATH = "a path, perhaps relative to the spec's folder"


_ROLES = {"--config-file": Role.CONFIG, "--dataset-path": Role.PATH}
"""Of the word after a flag of the script."""


class Word(NamedTuple):
    """One word of a command."""

    text: str
    role: Role = Role.TEXT


@dataclass(frozen=True)
class Plan:
    """Everything that a launcher needs."""

    name: str
    target: str
    config: Mapping[str, Any]
    nnodes: int
    command: tuple[str, ...]
    """What every node runs, with its rank as $NODE_RANK."""
    gpus_per_node: int
    """0 on the CPU."""
    env: Mapping[str, str | None]
    """Environment variables that the run needs, by rule; None: that it must not have."""
    run: Mapping[str, Any]
    """The `run` section: where the run directory goes, how it resumes. Not part of the identity."""
    launcher: Mapping[str, Any]
    """The `launcher` section: how the commands are started. Not part of the identity: a run goes on under another time limit."""
    guards: Mapping[str, str]
    spec_dir: str | None = None
    """The spec's folder, from the working directory (on disk: from the bundle); None: no path needs it. Not part of the identity."""

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed."""
        return {
            "format_version": FORMAT_VERSION, "name": self.name, "target": self.target, "config": self.config,
            "nnodes": self.nnodes, "command": list(self.command), "gpus_per_node": self.gpus_per_node, "env": dict(self.env),
        }  # fmt: skip

    @property
    def plan_id(self) -> str:
        """sha256 of the identity, hexadecimal."""
        return hashlib.sha256(canonical(self.identity).encode()).hexdigest()

    def words(self, node: int | None) -> tuple[Word, ...]:
        """What one node runs, or (None) any of them; the rendezvous is still the environment's."""
        own = {} if node is None else {RANK: str(node), IS_HOST: f"is_host={int(node == 0)}"}
        script = self.command.index(target_module(self.target).ENTRY)
        program, *flags = self.command[:script]
        found = [Word(program, Role.PROGRAM)]
        found += [Word(own[word]) if word in own else Word(word, Role.VARIABLE if word in VARIABLES else Role.TEXT) for word in flags]
        found.append(Word(self.command[script], Role.SCRIPT))
        found += [Word(word, _ROLES.get(flag, Role.TEXT)) for flag, word in pairwise(self.command[script:])]
        return tuple(found)

    def argv(self, node: int) -> tuple[str, ...]:
        """The same as plain words."""
        return tuple(word.text for word in self.words(node))

    def seen(self, path: Any) -> Any:
        """A path of the plan, as seen from the working directory; any other value as it is."""
        start = next((start for start in (SPEC_DIR, SPEC_DIR_UPSTREAM) if isinstance(path, str) and path.startswith(start)), None)
        return path if start is None else os.path.relpath((self.spec_dir or ".") + path.removeprefix(start))

    def located(self, path: str) -> str:
        """A path of the plan, absolute."""
        return os.path.abspath(os.path.expanduser(str(self.seen(path))))

    @property
    def launch_digest(self) -> str:
        """sha256 of what stands beside the identity."""
        return config_digest({"run": self.run, "launcher": self.launcher})

    def as_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        beside = {"run": dict(self.run), "launcher": dict(self.launcher), "launch": self.launch_digest, "guards": dict(self.guards), "spec_dir": self.spec_dir}
        return {"plan_id": f"sha256:{self.plan_id}", **self.identity, **beside}


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a configuration."""
    return "sha256:" + hashlib.sha256(canonical(config).encode()).hexdigest()


def make_plan(resolved: Resolved) -> Plan:
    """Compile a configuration without errors into a plan.

    Raises:
        InvalidSpec: the script would not read the plan as it is meant.
    """
    target = target_module(resolved.spec.target)
    values = _portable(resolved)
    nnodes = values["cluster.nnodes"]
    flags = _torchrun_flags(values["cluster.nproc_per_node"], nnodes, values["launcher.rendezvous"])
    command = ("torchrun", *flags, target.ENTRY, *target.arguments(values, resolved.origins))
    config = target.config(values)
    _require_kept(config, target.read_back(values, config_text(config)))
    gpus = values["cluster.nproc_per_node"] if values["cluster.device"] == "cuda" else 0
    return Plan(
        resolved.spec.name, resolved.spec.target, config, nnodes, command, gpus, environment(values),
        _section(values, "run."), _section(values, "launcher."), guards(resolved.values, resolved.spec.target),
        os.path.relpath(resolved.spec.folder) if values != resolved.values else None,
    )  # fmt: skip


def _portable(resolved: Resolved) -> dict[str, Any]:
    """The values, with every relative path of a person's as seen from the spec's folder; what nobody named stays where a run is started."""
    sources = {derivation.key: derivation.sources for derivation in target_module(resolved.spec.target).DERIVED}

    def named(key: str) -> bool:
        origin = resolved.origins[key]
        return origin.is_users or (origin.layer == "derived" and any(named(source) for source in PATH_KEYS.intersection(sources[key])))

    paths = {key: value for key in PATH_KEYS if is_relative(value := resolved.values.get(key)) and named(key)}
    return {**resolved.values, **{key: f"{SPEC_DIR}/{os.path.relpath(value, resolved.spec.folder)}" for key, value in paths.items()}}


def _require_kept(config: Mapping[str, Any], reading: Reading | None) -> None:
    """Nothing that a plan says may be lost; null asks the script to derive the value."""
    if reading is None:
        return
    lost = [f"{key} is dropped" for key in reading.skipped]
    for section, fields in config.items():
        for name, value in fields.items():
            meant, had = value.replace("${oc.env:DFMSPEC_", "${") if isinstance(value, str) else value, reading[f"{section}.{name}"]
            if name != "_target_" and had != meant and meant is not None:
                lost.append(f"{section}.{name} {canonical(meant)} becomes {canonical(had)}")
    if lost:
        raise InvalidSpec(f"the script would not read the plan as it is meant: {'; '.join(lost)}; set what it makes of it, or leave the key out")


def _section(values: Mapping[str, Any], start: str) -> dict[str, Any]:
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def _torchrun_flags(nproc: int, nnodes: int, rendezvous: str) -> list[str]:
    """The how-to's flags, in its order; or those of a rendezvous where the ranks of the nodes are agreed on."""
    flags = ["--nproc-per-node", str(nproc)]
    if nnodes > 1:
        flags += ["--nnodes", str(nnodes)]
        if rendezvous == "static":
            flags += ["--node-rank", RANK, "--master-addr", ADDR, "--master-port", PORT]
        else:
            flags += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDR}:{PORT}", "--rdzv-id", ID, "--rdzv-conf", IS_HOST]
    return flags


def guards(values: Mapping[str, Any], target: str) -> dict[str, str]:
    """Digests of what a plan takes for granted: this version's code, and the dataset's metadata."""
    trainer = target_module(target)
    found = {"code": code_digest()} if trainer.OWN else {}
    path = values["dataset.path"]
    if path and os.path.exists(dataset := local_path(path)):  # noqa: PTH110  which a name too long does not stop
        parts = everything(dataset, energon=trainer.ENERGON)
        if files := [file for part in parts for file in ([part] if is_metadataset(part) else metadata_files(part))]:
            found["dataset"] = _digest(files)
    return found


def code_digest() -> str:
    """sha256 over the package's Python files."""
    return _digest(sorted(Path(__file__).parents[1].rglob("*.py")))


def _digest(files: Any) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()


def config_text(config: Mapping[str, Any]) -> str:
    """config.yaml: JSON-compatible YAML, which PyYAML, ruamel and OmegaConf read alike."""
    lines = []
    for section, node in config.items():
        if isinstance(node, Mapping):
            lines.append(f"{section}:")
            lines += [f"  {field}: {write_scalar(value)}" for field, value in node.items()]
        else:
            lines.append(f"{section}: {write_scalar(node)}")
    return "\n".join(lines) + "\n"
