"""From what people have - a torchrun command, an override file - to a spec, with what never did anything listed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfmspec.bounded import SPEC_BYTES, read_text
from dfmspec.errors import UsageError
from dfmspec.read.document import Document, parse_document, read_document
from dfmspec.read.fixes import scalar
from dfmspec.read.load import unaliased
from dfmspec.read.shell import commands_of
from dfmspec.redaction import names_a_secret
from dfmspec.spec.iterations import split_iteration
from dfmspec.spec.paths import RUN_DIR
from dfmspec.targets import DEFAULT_UPSTREAM, TARGETS, target_module
from dfmspec.targets.dfm.upstream import Refused, loaded, value_of

_TORCHRUN = {
    "nproc_per_node": "cluster.nproc_per_node",
    "nnodes": "cluster.nnodes",
    "master_addr": "cluster.master_addr",
    "master_port": "cluster.master_port",
}
"""torchrun's flags that a spec has keys for."""
_DROPPED_TORCHRUN = {
    "node_rank": "the plan gives each node its own",
    "rdzv_id": "the plan gives each node its own",
    "rdzv_conf": "the plan gives each node its own",
    "standalone": "one node needs no rendezvous",
    "log_dir": "each rank's output is in the run directory",
    "tee": "each rank's output is in the run directory",
    "redirects": "each rank's output is in the run directory",
    "max_restarts": "dfmspec run resumes by itself",
}
"""torchrun's flags that a plan has no use for, and why."""
_RENDEZVOUS = ("rdzv_backend", "rdzv_endpoint")
_KNOWN_TORCHRUN = frozenset((*_TORCHRUN, *_DROPPED_TORCHRUN, *_RENDEZVOUS))
_SWITCHES = ("standalone",)
"""torchrun's flags without a value."""
_SHELL = ("export", "env", "exec", "&&", ";", "-m", "torch.distributed.run")
_PROGRAMS = ("torchrun", "python", "python3")
_SHELLS = ("bash", "sh", "zsh", "dash")
_ENDS_A_COMMAND = re.compile(r"(\d*|&)[<>].*|\|&?|\|\||&|&&|;")
SCRIPTS = {Path(target_module(name).ENTRY).name: name for name in TARGETS if not target_module(name).OWN}
"""Each script of others, and the target that it trains."""
_SCRIPT_SWITCHES = ("mock", "debug", "use_original_step", "use_loss_weighting")
"""The scripts' flags without a value."""
_OTHER_WORK = ("inference", "prepare", "convert", "finetune")
"""How scripts begin that train no model from a spec."""
_MARKS = ("++", "+", "~")
"""Hydra's signs before a key: set or add, add, delete."""
_OF_THE_SHELL = "a variable of your shell: give its value"


@dataclass
class Imported:
    """What was understood of a command or a file."""

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
    words = _without_shell(words)
    script = next((word for word in words if word.endswith(".py")), None)
    if script is None:
        raise UsageError("there is no training script (.py) in this command")
    position = words.index(script)
    found = Imported(target=_target(script, target))
    _launcher(words[:position], found)
    own = _until_the_end(words[position:])
    _script(own[1:], found)
    return found


def _without_shell(words: Sequence[str]) -> list[str]:
    """The words, with those that a shell is given as one (`bash -c '...'`) in its place."""
    own = list(words)
    for i in range(2, len(own)):
        if re.fullmatch(r"-[a-z]*c", own[i - 1]) and Path(own[i - 2]).name in _SHELLS:
            return _without_shell([*own[: i - 2], *split_command(own[i])])
    return own


def _until_the_end(words: Sequence[str]) -> list[str]:
    """The words before a pipe, a redirection or another command."""
    own: list[str] = []
    for word in words:
        if _ENDS_A_COMMAND.fullmatch(word):
            break
        own.append(word)
    return own


def _target(script: str, asked: str | None) -> str:
    """What a script trains: what is asked for, else what its name says."""
    name = Path(script).name
    known = SCRIPTS.get(name)
    if known is None and (asked is None or name.startswith(_OTHER_WORK)):
        scripts = ", ".join(SCRIPTS)
        raise UsageError(
            f"{name} is not a script that dfmspec knows to train: {scripts}; for a copy of one of them give --target"
        )
    is_anothers = known is not None and asked not in (None, known)
    if is_anothers and not _has_its_script(asked, name):
        raise UsageError(f"{name} trains target {known}, not {asked}; leave --target out")
    return asked or known or DEFAULT_UPSTREAM


def _has_its_script(target: str | None, script: str) -> bool:
    """Whether a target has a script of this name too: ours has that of DFM's DiT."""
    if target is None:
        return False
    return Path(target_module(target).ENTRY).name == script


def import_script(file: Path, target: str | None = None) -> Imported:
    """A shell script with one training command; its exports before it count as the command's environment.

    Raises:
        UsageError: it cannot be read, or has no command, or several.
    """
    try:
        text = read_text(file, most=SPEC_BYTES, errors="replace")
    except OSError as error:
        raise _unreadable(str(file), error) from error
    lines = commands_of(text)
    commands = [line for line in lines if _starts_a_script(line)]
    if len(commands) != 1:
        raise UsageError(
            f"{file} has {len(commands)} commands that start a script; give the one that trains, in quotes"
        )
    before = lines[: lines.index(commands[0])]
    exports = [line for line in before if line.lstrip().startswith("export ")]
    command = " ".join([*exports, commands[0]])
    return import_command(split_command(command), target)


def _starts_a_script(line: str) -> bool:
    """Whether a line of a shell script starts a Python script."""
    if line.lstrip().startswith("#"):
        return False
    command = r"(torchrun|python3?|torch\.distributed\.run)\b.*\.py\b"
    return re.search(command, line) is not None


def import_file(file: Path, target: str | None = None) -> Imported:
    """An override file.

    Raises:
        UsageError: it cannot be read, or is no mapping of sections.
    """
    found = Imported(target=target or DEFAULT_UPSTREAM)
    try:
        document = read_document(file, may_be_a_pipe=True)
    except OSError as error:
        raise _unreadable(str(file), error) from error
    _lay(document, found)
    return found


def _unreadable(what: str, error: OSError) -> UsageError:
    """The error of a file that the system does not give."""
    reason = error.strerror or error
    return UsageError(f"{what} cannot be read: {reason}")


# The words before the script.


def _launcher(words: Sequence[str], found: Imported) -> None:
    """torchrun's flags, and the environment before it."""
    rest = _without_variables(words, found)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("-"):
            name = ""
        takes_next = name in _KNOWN_TORCHRUN and name not in _SWITCHES and not equals
        if takes_next and rest:
            value = rest.pop(0)
        if name in _TORCHRUN:
            _keep(_TORCHRUN[name], value, _value_of(value), found)
        elif name in _RENDEZVOUS:
            _rendezvous(name, value, found)
        elif name in _DROPPED_TORCHRUN:
            flag = name.replace("_", "-")
            written = f"--{flag} {value}".strip()
            found.dead.append((written, _DROPPED_TORCHRUN[name]))
        elif "$" in word:
            found.dead.append((word, _OF_THE_SHELL))
        elif not word.endswith(_PROGRAMS) and word not in _SHELL:
            found.dead.append((word, "not carried over: set it where the run is launched"))


def _without_variables(words: Sequence[str], found: Imported) -> list[str]:
    """The words that set no variable; the others are kept as the launcher's environment."""
    rest = []
    for word in words:
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        name, value = match.groups()
        if names_a_secret(name):
            found.dead.append((f"{name}=...", "a secret: export it where the run starts"))
        elif "$" in value or "`" in value:
            found.dead.append((word, _OF_THE_SHELL))
        else:
            found.values.setdefault("launcher.env", {})[name] = value
    return rest


def _rendezvous(flag: str, value: str, found: Imported) -> None:
    """Where and how the nodes meet."""
    if flag == "rdzv_backend":
        if value in ("static", "c10d"):
            found.values["launcher.rendezvous"] = value
        else:
            found.dead.append((f"--rdzv-backend {value}", "static and c10d are what a plan knows"))
        return
    host, colon, port = value.rpartition(":")
    if not colon:
        host = value
    # An IPv6 address stands in brackets before a port.
    _keep("cluster.master_addr", host, host.strip("[]"), found)
    if colon:
        _keep("cluster.master_port", port, _value_of(port), found)


# The words behind it.


def _script(words: Sequence[str], found: Imported) -> None:
    """The script's own flags, with argparse's abbreviations, and Hydra's overrides."""
    # Flags. argparse takes the beginning of a name for the whole, where only one name has it.
    trained_by = target_module(found.target)
    rest = list(words)
    overrides: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            overrides.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        beginning = name.replace("-", "_")
        meant = [flag for flag in trained_by.SCRIPT_FLAGS if flag.startswith(beginning)]
        if len(meant) != 1:
            found.dead.append((word, "the script has no such flag, and its command line fails"))
            continue
        flag = meant[0]
        written = word
        if not equals:
            if rest and flag not in _SCRIPT_SWITCHES:
                value = rest.pop(0)
            written = f"{word} {value}".strip()
        _script_flag(flag, value, written, found)

    # The file that the script reads where no --config-file is given.
    own_file = trained_by.OWN_FILE
    has_config_file = any(word.startswith("--c") for word in words)
    if own_file is not None and not has_config_file:
        found.dead.append((own_file, "the script reads this file of its own: import it with --config-file"))

    # Overrides lie over the file, wherever they stand.
    for override in overrides:
        _override(override, found)


def _script_flag(flag: str, value: str, written: str, found: Imported) -> None:
    """One flag of the script, by its whole name; written: as the command has it."""
    is_the_plans = flag == "debug" or (flag == "training_mode" and value == "pretrain")
    if flag == "mock":
        found.values["data.source"] = "mock"
    elif flag == "dataset_path":
        # Upstream puts it into the recipe, under the file's own dataset.path.
        if "dataset.path" not in found.values:
            _keep("dataset.path", value, value, found)
    elif flag == "config_file":
        _lay(_readable(value), found)
    elif flag == "guidance_scale":
        _keep("model.guidance_scale", value, _value_of(value), found)
    elif not is_the_plans:
        found.dead.append((written, "not carried over: the plan pretrains, with the script's own defaults"))


def _keep(key: str, text: str, value: Any, found: Imported) -> None:
    """A key's value, unless it is for a shell to fill in."""
    if "$" in text.replace(RUN_DIR, "") or "`" in text:
        found.dead.append((f"{key}={text}", _OF_THE_SHELL))
    elif key == "mixed_precision" and isinstance(value, str):
        found.values["mixed_precision.recipe"] = value
    else:
        found.values[key] = value


def _value_of(text: str) -> Any:
    """A value as YAML reads it; text where it cannot."""
    document = parse_document(f"v: {text.strip()}".encode(), "")
    if not isinstance(document.data, dict) or document.problems:
        return text
    return document.data["v"]


def _readable(name: str) -> Document:
    """The file that a command names."""
    try:
        return read_document(name, may_be_a_pipe=True)
    except OSError as error:
        raise _unreadable(f"--config-file {name}", error) from error


def _lay(document: Document, found: Imported) -> None:
    """An override file's keys, with the values that upstream reads; a section that is no mapping is kept as it is."""
    if not isinstance(document.data, dict):
        message = f"{document.file} is no mapping of sections"
        if document.problems:
            message += f": {document.problems[0].message}"
        raise UsageError(message)

    # What YAML 1.1 and 1.2 read differently is no loss here: the values are those of upstream's reader.
    for problem in document.problems:
        if problem.name != "ambiguous-scalar":
            place = f"line {problem.span.line}"
            found.dead.append((place, problem.message))
    try:
        tree = loaded(document.text)
    except Refused as error:
        raise UsageError(f"{document.file}: upstream cannot read it: {error}") from error

    for section, node in tree.items():
        if not isinstance(section, str):
            found.dead.append((f"{section}: ...", "to YAML 1.1 this is no text, so it names no section"))
        elif not isinstance(node, dict):
            _keep(section, str(node), node, found)
        else:
            _lay_section(section, node, found)


def _lay_section(section: str, node: dict[Any, Any], found: Imported) -> None:
    """The keys of a section."""
    for name, value in node.items():
        # OmegaConf's word for a value that is missing: the merge leaves what is there.
        if value == "???":
            found.dead.append((f"{section}.{name}: ???", "keeps the recipe's value"))
        else:
            found.values[f"{section}.{name}"] = value


def _override(text: str, found: Imported) -> None:
    """One of Hydra's `key=value`, `+key=value`, `++key=value` or `~key`."""
    prefix = next((mark for mark in _MARKS if text.startswith(mark)), "")
    key, equals, value = text.removeprefix(prefix).partition("=")
    if prefix == "~":
        found.dead.append((text, "deleting a key does nothing upstream"))
    elif not equals and "$" in text:
        found.dead.append((text, _OF_THE_SHELL))
    elif not equals:
        found.dead.append((text, "no key=value, so the command line fails"))
    elif prefix == "+":
        found.dead.append((text, "an added key is dropped in silence, or the command line fails"))
    else:
        try:
            _keep(key, value, value_of(value), found)
        except Refused:
            found.dead.append((text, "Hydra's grammar has no such value unquoted, so the command line fails"))


def renamed_checkpoints(found: Imported) -> list[tuple[str, str]]:
    """Give the how-to's names for keys of checkpoints their real ones, and return which were renamed.

    The how-to names the folder of an iteration to be loaded; the key takes the folder above it, and ckpt_step the
    iteration.
    """
    renamed = []
    values: dict[str, Any] = {}
    for name, value in found.values.items():
        key = unaliased(name)
        if key == name or key in found.values:
            values[name] = value
            continue
        renamed.append((name, key))
        values[key] = value
        if key == "checkpoint.load" and isinstance(value, str):
            values[key], step = split_iteration(value)
            if step is not None:
                values.setdefault("checkpoint.ckpt_step", step)
    found.values = values
    return renamed


def spec_of(found: Imported, target: str, dead_keys: dict[str, str]) -> str:
    """The spec's text: live keys, then what is dead as comments.

    Args:
        dead_keys: keys of what was found that change nothing, each with the reason.

    Raises:
        UsageError: the text does not hold what was found, since two keys stand against each other.
    """
    live = {key: value for key, value in found.values.items() if key not in dead_keys}
    lines = [f"target: {target}", *_live_lines(live)]
    comments = []
    for key, why in dead_keys.items():
        value = _value(found.values[key])
        comments.append(_comment(f"{key}: {value}", why))
    for word, why in found.dead:
        comments.append(_comment(word, why))
    if comments:
        lines += ["", "# What did nothing, or could not be read:", *comments]
    text = "\n".join(lines) + "\n"

    # The proof: read again, it holds what was found.
    wanted = live | {"target": target}
    document = parse_document(text.encode(), "")
    written = _by_key(document.data or {})
    if written != wanted:
        odd = _first_lost(wanted, written)
        raise UsageError(
            f"{odd} stands against another key of this command, or cannot be written as YAML; "
            "import it without that word"
        )
    return text


def _first_lost(wanted: dict[str, Any], written: dict[str, Any]) -> str:
    """The key that the written text does not hold as it was wanted."""
    for key, value in wanted.items():
        if key not in written or written[key] != value:
            return key
    return "a key"


def _live_lines(live: dict[str, Any]) -> list[str]:
    """The keys as YAML: those without a section first."""
    top: list[str] = []
    sections: dict[str, list[str]] = {}
    for key, value in live.items():
        section, dot, name = key.partition(".")
        if dot:
            entries = sections.setdefault(section, [])
            entries.append("  " + _entry(name, value))
        elif key != "target":
            top.append(_entry(key, value))
    lines = top
    for section, entries in sections.items():
        lines.append(f"{scalar(section)}:")
        lines.extend(entries)
    return lines


def _entry(key: str, value: Any) -> str:
    """A key and its value in YAML, on one line."""
    return f"{scalar(key)}: {_value(value)}"


def _comment(word: str, why: str) -> str:
    """A line of what did nothing; a word may have line ends in it."""
    words = f"{word}  ({why})".split()
    return "#   " + " ".join(words)


def _by_key(data: dict[str, Any]) -> dict[str, Any]:
    """The data of a spec as `section.field`, and top-level keys."""
    values: dict[str, Any] = {}
    for name, node in data.items():
        if not isinstance(node, dict):
            values[name] = node
            continue
        for key, value in node.items():
            values[f"{name}.{key}"] = value
    return values


def _value(value: Any) -> str:
    """A value in YAML's flow style."""
    if isinstance(value, list):
        items = ", ".join(map(_value, value))
        return f"[{items}]"
    if isinstance(value, dict):
        entries = ", ".join(_entry(str(key), inner) for key, inner in value.items())
        return f"{{{entries}}}"
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
