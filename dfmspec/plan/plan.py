"""From Resolved to a Plan: the files and commands of a run, byte for byte the same wherever they are made.

A plan's identity is the sha256 of its canonical JSON. What may change behind its back (dfmspec's own code, the
dataset's metadata) stands beside it as guards, in a file of their own: a run whose guards no longer hold is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.bounded import METADATA_BYTES, read_beginning
from dfmspec.data.energon_metadata import metadata_files
from dfmspec.data.metadataset import everything, is_metadataset
from dfmspec.errors import InvalidSpec
from dfmspec.plan.environment import environment
from dfmspec.plan.secrets import references
from dfmspec.read.document import write_scalar
from dfmspec.read.resolve import Resolved
from dfmspec.spec.containers import is_file
from dfmspec.spec.digest import canonical, config_digest, file_digest
from dfmspec.spec.paths import PATH_KEYS, SPEC_DIR, SPEC_DIR_UPSTREAM, absolute, is_relative, local_path
from dfmspec.targets import TARGETS, Reading, target_module

FORMAT_VERSION = 2
"""Of plan.json. 1 had the guards in it, and no revision."""
_IDENTITY_VERSION = 1
"""Of what is hashed: a plan keeps its id where only its file has changed."""

RANK = "$NODE_RANK"
ADDR = "$MASTER_ADDR"
PORT = "$MASTER_PORT"
ENDPOINT = f"{ADDR}:{PORT}"
ID = "$DFMSPEC_RDZV_ID"
IS_HOST = "is_host=$((NODE_RANK == 0))"
"""Node 0 keeps the rendezvous, whatever name its address resolves to."""
OF_A_NODE = (RANK, IS_HOST)
VARIABLES = (*OF_A_NODE, ADDR, PORT, ID, ENDPOINT)
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
"""Flag of the script -> the role of the word after it."""


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
    """The `launcher` section: how the commands are started.

    Not part of the identity: a run goes on under another time limit.
    """
    guards: Mapping[str, str]
    spec_dir: str | None = None
    """The spec's folder, from the working directory (on disk: from the bundle); None: no path needs it.

    Not part of the identity.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed."""
        return {
            "format_version": _IDENTITY_VERSION,
            "name": self.name,
            "target": self.target,
            "config": self.config,
            "nnodes": self.nnodes,
            "command": list(self.command),
            "gpus_per_node": self.gpus_per_node,
            "env": dict(self.env),
        }

    @property
    def plan_id(self) -> str:
        """sha256 of the identity, hexadecimal."""
        return hashlib.sha256(canonical(self.identity).encode()).hexdigest()

    @property
    def recorded_id(self) -> str:
        """plan_id as files and records have it."""
        return f"sha256:{self.plan_id}"

    @property
    def short_id(self) -> str:
        """The first twelve digits of plan_id, by which scripts and folders name the plan."""
        return self.plan_id[:12]

    def words(self, node: int | None) -> tuple[Word, ...]:
        """What one node runs, or (None) any of them; the rendezvous is still the environment's."""
        at_script = self.command.index(target_module(self.target).ENTRY)
        program, *flags = self.command[:at_script]
        found = [Word(program, Role.PROGRAM)]
        found += [_flag_word(flag, node) for flag in flags]

        # The script, and its arguments: what each is, the flag before it tells.
        found.append(Word(self.command[at_script], Role.SCRIPT))
        for before, text in pairwise(self.command[at_script:]):
            found.append(Word(text, _ROLES.get(before, Role.TEXT)))
        return tuple(found)

    def argv(self, node: int) -> tuple[str, ...]:
        """What one node runs, as plain words."""
        return tuple(word.text for word in self.words(node))

    def seen(self, path: Any) -> Any:
        """A path of the plan, as seen from the working directory; any other value as it is."""
        if not isinstance(path, str):
            return path
        for start in (SPEC_DIR, SPEC_DIR_UPSTREAM):
            if path.startswith(start):
                return os.path.relpath((self.spec_dir or ".") + path.removeprefix(start))
        return path

    def located(self, path: str) -> str:
        """A path of the plan, absolute; an address as it is."""
        return absolute(str(self.seen(path)))

    @property
    def secrets(self) -> dict[str, str]:
        """Variable -> where each node has its value: env:NAME, file:PATH or cmd:COMMAND."""
        return references(self.launcher["env"])

    def as_values(self) -> dict[str, Any]:
        """Keys of a spec, with what the plan has of them: its configuration, its launch and its machines."""
        values: dict[str, Any] = {"name": self.name, "target": self.target}
        for section, fields in {**self.config, "launcher": self.launcher, "run": self.run}.items():
            if isinstance(fields, Mapping):
                values |= {f"{section}.{field}": self.seen(value) for field, value in fields.items()}
        values["cluster.nnodes"] = self.nnodes
        values["cluster.nproc_per_node"] = int(self.command[self.command.index("--nproc-per-node") + 1])
        return values

    @property
    def launch_digest(self) -> str:
        """sha256 of what stands beside the identity."""
        return config_digest({"run": self.run, "launcher": self.launcher})

    def as_json(self) -> dict[str, Any]:
        """The content of plan.json: all but the guards, so that it has the same bytes on any machine."""
        return {
            "plan_id": self.recorded_id,
            **self.identity,
            "format_version": FORMAT_VERSION,
            # Beside the identity.
            "revision": TARGETS[self.target].revision,
            "run": dict(self.run),
            "launcher": dict(self.launcher),
            "launch": self.launch_digest,
            "spec_dir": self.spec_dir,
        }


def _flag_word(text: str, node: int | None) -> Word:
    """A word of torchrun's flags; a node's own rank is filled in, unless (None) the word is for any of them."""
    if text not in VARIABLES:
        return Word(text)
    if node is None or text not in OF_A_NODE:
        return Word(text, Role.VARIABLE)
    if text == RANK:
        return Word(str(node))
    is_host = int(node == 0)
    return Word(f"is_host={is_host}")


def make_plan(resolved: Resolved) -> Plan:
    """Compile a configuration without errors into a plan.

    Raises:
        InvalidSpec: the script would not read the plan as it is meant.
    """
    target = target_module(resolved.spec.target)
    values = _portable(resolved)
    nproc = values["cluster.nproc_per_node"]
    nnodes = values["cluster.nnodes"]

    # The command, and the configuration that it reads.
    flags = _torchrun_flags(nproc, nnodes, values["launcher.rendezvous"])
    flags += values["launcher.torchrun_options"] or []
    command = ("torchrun", *flags, target.ENTRY, *target.arguments(values, resolved.origins))
    config = target.config(values)
    _require_kept(config, target.read_back(values, config_text(config)))

    needs_spec_dir = values != resolved.values
    return Plan(
        name=resolved["name"],
        target=resolved.spec.target,
        config=config,
        nnodes=nnodes,
        command=command,
        gpus_per_node=nproc if values["cluster.device"] == "cuda" else 0,
        env=environment(values),
        run=_section(values, "run."),
        launcher=_section(values, "launcher.", but=("launcher.env_presets",)),  # which are in env
        guards=guards(resolved.values, resolved.spec.target),
        spec_dir=os.path.relpath(resolved.spec.folder) if needs_spec_dir else None,
    )


def _portable(resolved: Resolved) -> dict[str, Any]:
    """The values, with every relative path that a person named as seen from the spec's folder.

    A relative path that nobody named stays: it is relative to where a run is started.
    """
    derived = target_module(resolved.spec.target).DERIVED
    sources = {derivation.key: derivation.sources for derivation in derived}
    values = dict(resolved.values)
    for key in PATH_KEYS:
        path = values.get(key)
        if not is_relative(path):
            continue
        if not _is_named(key, resolved, sources):
            continue
        from_spec = os.path.relpath(path, resolved.spec.folder)
        values[key] = f"{SPEC_DIR}/{from_spec}"
    return values


def _is_named(key: str, resolved: Resolved, sources: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a person named a path, or one that it is derived from."""
    origin = resolved.origins[key]
    if origin.is_set_by_user:
        return True
    if origin.layer != "derived":
        return False
    return any(_is_named(source, resolved, sources) for source in PATH_KEYS.intersection(sources[key]))


def _require_kept(config: Mapping[str, Any], reading: Reading | None) -> None:
    """Nothing that a plan says may be lost; null asks the script to derive the value.

    Raises:
        InvalidSpec: the script would drop a key, or make another value of it.
    """
    if reading is None:
        return
    lost = [f"{key} is dropped" for key in reading.skipped]
    for section, fields in config.items():
        for name, value in fields.items():
            key = f"{section}.{name}"
            meant = _without_resolver(value)
            had = reading[key]
            if name == "_target_" or meant is None or had == meant:
                continue
            lost.append(f"{key} {canonical(meant)} becomes {canonical(had)}")
    if lost:
        all_lost = "; ".join(lost)
        raise InvalidSpec(
            f"the script would not read the plan as it is meant: {all_lost}; "
            "set what it makes of it, or leave the key out"
        )


def _without_resolver(value: Any) -> Any:
    """A value of the configuration as the script has it read back: OmegaConf's `oc.env` is filled in."""
    if isinstance(value, str):
        return value.replace("${oc.env:DFMSPEC_", "${")
    return value


def _section(values: Mapping[str, Any], start: str, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of one section, of which the keys begin with `start`, less some."""
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start) and key not in but}


def _torchrun_flags(nproc: int, nnodes: int, rendezvous: str) -> list[str]:
    """The how-to's flags, in its order; or those of a rendezvous where the ranks of the nodes are agreed on."""
    flags = ["--nproc-per-node", str(nproc)]
    if nnodes <= 1:
        return flags
    flags += ["--nnodes", str(nnodes)]
    if rendezvous == "static":
        flags += ["--node-rank", RANK]
        flags += ["--master-addr", ADDR]
        flags += ["--master-port", PORT]
    else:
        flags += ["--rdzv-backend", "c10d"]
        flags += ["--rdzv-endpoint", ENDPOINT]
        flags += ["--rdzv-id", ID]
        flags += ["--rdzv-conf", IS_HOST]
    return flags


def guards(values: Mapping[str, Any], target: str) -> dict[str, str]:
    """Digests of what a plan takes for granted: this version's code, and the dataset's metadata."""
    trainer = target_module(target)
    found = {"code": code_digest()} if trainer.OWN else {}
    found |= _of_the_image(values.get("launcher.container"))
    path = values["dataset.path"]
    if not path:
        return found
    dataset = local_path(path)
    if not os.path.exists(dataset):  # noqa: PTH110  which a name too long does not stop
        return found

    # A metadataset is metadata itself; a folder of shards has files of it.
    files: list[Path] = []
    for part in everything(dataset, energon=trainer.ENERGON):
        if is_metadataset(part):
            files.append(part)
        else:
            files += metadata_files(part)
    if files:
        found["dataset"] = _digest(files)
    return found


def _of_the_image(image: str | None) -> dict[str, str]:
    """The digest of an image that is a file of this machine; one that is named has it in its name."""
    if image is None or not is_file(image):
        return {}
    file = local_path(image)
    return {"container": file_digest(file)} if file.is_file() else {}


def code_digest() -> str:
    """sha256 over the package's code: Python files, and the templates that plans are written with."""
    package = Path(__file__).parents[1]
    code = [*package.rglob("*.py"), *package.rglob("*.sbatch")]
    return _digest(sorted(code))


def _digest(files: Iterable[Path]) -> str:
    """sha256 over the names and contents of files, in their order; of one that is too large, its beginning."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file.name) + b"\0" + read_beginning(file, most=METADATA_BYTES) + b"\0")
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
