"""From what people have - a torchrun command, an override file - to a spec, with what never did anything listed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec.errors import UsageError
from dfmspec.read.document import Document, parse_document, read_document
from dfmspec.read.fixes import scalar
from dfmspec.spec.secrets import names_a_secret
from dfmspec.targets import DEFAULT_UPSTREAM, TARGETS, target_module
from dfmspec.targets.dfm.upstream import Refused, loaded, value_of

_TORCHRUN = {
    "nproc_per_node": "cluster.nproc_per_node", "nnodes": "cluster.nnodes", "master_addr": "cluster.master_addr", "master_port": "cluster.master_port",
}  # fmt: skip
_DROPPED_TORCHRUN = {
    **dict.fromkeys(("node_rank", "rdzv_id", "rdzv_conf"), "the plan gives each node its own"), "standalone": "one node needs no rendezvous",
    **dict.fromkeys(("log_dir", "tee", "redirects"), "each rank's output is in the run directory"), "max_restarts": "dfmspec run resumes by itself",
}  # fmt: skip
_RENDEZVOUS = ("rdzv_backend", "rdzv_endpoint")
_SWITCHES = ("standalone",)
_SHELL = ("export", "env", "exec", "&&", ";", "-m", "torch.distributed.run")
_ENDS_A_COMMAND = re.compile(r"\d?>.*|\||\|\||&|&&|;")
SCRIPTS = {Path(target_module(name).ENTRY).name: name for name in TARGETS if not target_module(name).OWN}
"""Each script of others, and the target that it trains."""
_FLAGS = ("mock", "debug", "use_original_step", "use_loss_weighting")


@dataclass
class Imported:
    """What was understood."""

    values: dict[str, Any] = field(default_factory=dict)
    """Key -> value, of the Megatron sections and of ours."""
    dead: list[tuple[str, str]] = field(default_factory=list)
    """(word, why it did nothing, or was no word at all)."""
    target: str = DEFAULT_UPSTREAM


def import_command(words: Sequence[str], target: str | None = None) -> Imported:
    """A torchrun line for one of DFM's pretraining scripts, as upstream would read it.

    Args:
        target: what trains; None: what the script's name says.

    Raises:
        UsageError: the words hold no script that is known, or name a file that cannot be read.
    """
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        raise UsageError("there is no training script (.py) in this command")
    found = Imported(target=_target(words[script], target))
    end = next((i for i in range(script, len(words)) if _ENDS_A_COMMAND.fullmatch(words[i])), len(words))
    _launcher(words[:script], found)
    _script(words[script + 1 : end], found)
    return found


def _target(script: str, asked: str | None) -> str:
    """What a script trains."""
    name = Path(script).name
    known = SCRIPTS.get(name)
    if known is None and (asked is None or name.startswith(("inference", "prepare", "convert", "finetune"))):
        raise UsageError(f"{name} is not a script that dfmspec knows to train: {', '.join(SCRIPTS)}; for a copy of one of them give --target")
    if known is not None and asked not in (None, known) and not _has_its_script(asked, name):
        raise UsageError(f"{name} trains target {known}, not {asked}; leave --target out")
    return asked or known or DEFAULT_UPSTREAM


def _has_its_script(target: str | None, script: str) -> bool:
    """Whether a target has a script of this name too: ours has that of DFM's DiT."""
    return target is not None and Path(target_module(target).ENTRY).name == script


def import_script(file: Path, target: str | None = None) -> Imported:
    """A shell script with one training command; its exports before it count as the command's environment.

    Raises:
        UsageError: it cannot be read, or has no command, or several.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").replace("\\\n", " ").splitlines()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    commands = [line for line in lines if re.search(r"(torchrun|python3?|torch\.distributed\.run)\b.*\.py\b", line) and not line.lstrip().startswith("#")]
    if len(commands) != 1:
        raise UsageError(f"{file} has {len(commands)} commands that start a script; give the one that trains, in quotes")
    exports = [line for line in lines[: lines.index(commands[0])] if line.lstrip().startswith("export ")]
    return import_command(split_command(" ".join([*exports, commands[0]])), target)


def import_file(file: Path, target: str | None = None) -> Imported:
    """An override file.

    Raises:
        UsageError: it cannot be read, or is no mapping of sections.
    """
    found = Imported(target=target or DEFAULT_UPSTREAM)
    try:
        document = read_document(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    _lay(document, found)
    return found


def _launcher(words: Sequence[str], found: Imported) -> None:
    """torchrun's flags, and the environment before it."""
    rest = []
    for word in words:
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", word, re.DOTALL)
        if match is None:
            rest.append(word)
        elif names_a_secret(match[1]):
            found.dead.append((f"{match[1]}=...", "a secret: export it where the run starts"))
        elif "$" in match[2] or "`" in match[2]:
            found.dead.append((word, "a variable of your shell: give its value"))
        else:
            found.values.setdefault("launcher.env", {})[match[1]] = match[2]
    position = 0
    while position < len(rest):
        name, equals, value = rest[position].lstrip("-").partition("=")
        name = name.replace("-", "_")
        flagged = rest[position].startswith("-")
        position += 1
        if flagged and not equals and name not in _SWITCHES and position < len(rest) and name in (*_TORCHRUN, *_DROPPED_TORCHRUN, *_RENDEZVOUS):
            value = rest[position]
            position += 1
        if name in _TORCHRUN and flagged:
            _keep(_TORCHRUN[name], value, _value_of(value), found)
        elif name in _RENDEZVOUS and flagged:
            _rendezvous(name, value, found)
        elif name in _DROPPED_TORCHRUN and flagged:
            found.dead.append((f"--{name.replace('_', '-')} {value}".strip(), _DROPPED_TORCHRUN[name]))
        elif not (rest[position - 1].endswith(("torchrun", "python", "python3")) or rest[position - 1] in _SHELL):
            found.dead.append((rest[position - 1], "not carried over: set it where the run is launched"))


def _rendezvous(flag: str, value: str, found: Imported) -> None:
    """Where and how the nodes meet."""
    if flag == "rdzv_backend":
        if value in ("static", "c10d"):
            found.values["launcher.rendezvous"] = value
        else:
            found.dead.append((f"--rdzv-backend {value}", "static and c10d are what a plan knows"))
        return
    host, colon, port = value.rpartition(":")
    _keep("cluster.master_addr", host if colon else value, (host if colon else value).strip("[]"), found)
    if colon:
        _keep("cluster.master_port", port, _value_of(port), found)


def _script(words: Sequence[str], found: Imported) -> None:
    """The script's own flags, with argparse's abbreviations, and Hydra's overrides."""
    rest = list(words)
    overrides: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            overrides.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        meant = [known for known in target_module(found.target).SCRIPT_FLAGS if known.startswith(name.replace("-", "_"))]
        if len(meant) != 1:
            found.dead.append((word, "the script has no such flag, and its command line fails"))
            continue
        if meant[0] not in _FLAGS and not equals:
            value = rest.pop(0) if rest else ""
        if meant[0] == "mock":
            found.values["data.source"] = "mock"
        elif meant[0] == "dataset_path":
            if "dataset.path" not in found.values:
                _keep("dataset.path", value, value, found)
        elif meant[0] == "config_file":
            _lay(_readable(value), found)
        elif meant[0] == "guidance_scale":
            _keep("model.guidance_scale", value, _value_of(value), found)
        elif (meant[0], value) != ("training_mode", "pretrain") and meant[0] != "debug":
            found.dead.append((f"{word} {value}".strip() if not equals else word, "not carried over: the plan pretrains, with the script's own defaults"))
    own_file = target_module(found.target).OWN_FILE
    if own_file is not None and not any(word.startswith("--c") for word in words):
        found.dead.append((own_file, "the script reads this file of its own: import it with --config-file"))
    for override in overrides:
        _override(override, found)


def _keep(key: str, text: str, value: Any, found: Imported) -> None:
    """A key's value, unless it is for a shell to fill in."""
    if "$" in text.replace("${RUN_DIR}", "") or "`" in text:
        found.dead.append((f"{key}={text}", "a variable of your shell: give its value"))
    else:
        found.values["mixed_precision.recipe" if key == "mixed_precision" and isinstance(value, str) else key] = value


def _value_of(text: str) -> Any:
    """A value as YAML reads it; text where it cannot."""
    document = parse_document(f"v: {text.strip()}".encode(), "")
    return document.data["v"] if isinstance(document.data, dict) and not document.problems else text


def _readable(name: str) -> Document:
    try:
        return read_document(name)
    except OSError as error:
        raise UsageError(f"--config-file {name} cannot be read: {error.strerror or error}") from error


def _lay(document: Document, found: Imported) -> None:
    """An override file's keys, with the values that upstream reads; a section that is no mapping is kept as it is."""
    if not isinstance(document.data, dict):
        raise UsageError(f"{document.file} is no mapping of sections" + (f": {document.problems[0].message}" if document.problems else ""))
    found.dead += [(f"line {problem.span.line}", problem.message) for problem in document.problems if problem.name != "ambiguous-scalar"]
    try:
        tree = loaded(document.text)
    except Refused as error:
        raise UsageError(f"{document.file}: upstream cannot read it: {error}") from error
    for section, node in tree.items():
        if isinstance(node, dict):
            found.values.update({f"{section}.{name}": value for name, value in node.items() if value != "???"})
            found.dead += [(f"{section}.{name}: ???", "keeps the recipe's value") for name, value in node.items() if value == "???"]
        else:
            _keep(section, str(node), node, found)


def _override(text: str, found: Imported) -> None:
    """One of Hydra's `key=value`, `+key=value`, `++key=value` or `~key`."""
    mark = re.match(r"(\+\+|\+|~)?", text)
    prefix = mark[0] if mark else ""
    key, equals, value = text[len(prefix) :].partition("=")
    if prefix == "~":
        found.dead.append((text, "deleting a key does nothing upstream"))
    elif not equals:
        found.dead.append((text, "no key=value, so the command line fails"))
    elif prefix == "+":
        found.dead.append((text, "an added key is dropped in silence, or the command line fails"))
    else:
        try:
            _keep(key, value, value_of(value), found)
        except Refused:
            found.dead.append((text, "Hydra's grammar has no such value unquoted, so the command line fails"))


def spec_of(found: Imported, target: str, dead_keys: dict[str, str]) -> str:
    """The spec's text: live keys, then what is dead as comments."""
    lines = [f"target: {target}"]
    sections: dict[str, list[str]] = {}
    for key, value in found.values.items():
        if key in dead_keys:
            continue
        section, dot, name = key.partition(".")
        if dot:
            sections.setdefault(section, []).append(f"  {scalar(name)}: {_value(value)}")
        elif key != "target":
            lines.append(f"{scalar(key)}: {_value(value)}")
    for section, entries in sections.items():
        lines += [f"{scalar(section)}:", *entries]
    dead = [(f"{key}: {_value(found.values[key])}", why) for key, why in dead_keys.items()] + found.dead
    if dead:
        lines += ["", "# What did nothing, or could not be read:", *(f"#   {' '.join(f'{word}  ({why})'.split())}" for word, why in dead)]
    text = "\n".join(lines) + "\n"
    data = parse_document(text.encode(), "").data or {}
    written = {f"{name}.{key}": value for name, node in data.items() if isinstance(node, dict) for key, value in node.items()}
    written |= {name: node for name, node in data.items() if not isinstance(node, dict)}
    wanted = {key: value for key, value in found.values.items() if key not in dead_keys} | {"target": target}
    if written != wanted:
        odd = next((key for key in wanted if written.get(key, written) != wanted[key]), "a key")
        raise UsageError(f"{odd} stands against another key of this command, or cannot be written as YAML; import it without that word")
    return text


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(str(key))}: {_value(inner)}" for key, inner in value.items()) + "}"
    return scalar(value)


def split_command(text: str) -> list[str]:
    """A command as the shell splits it, line continuations and all.

    Raises:
        UsageError: a quote is not closed.
    """
    try:
        return shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise UsageError(f"the command cannot be split: {error}") from error
