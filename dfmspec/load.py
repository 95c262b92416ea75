"""From files and overrides to a Spec: one value per key, the origin of each, and every structural finding.

Layers, lowest first: the target's defaults, the recipe, `extends` left to right, `config_file`, the spec's own keys,
flags, `key=value`. Every layer is checked alike: unknown keys, types and ranges are errors wherever they stand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any

import yaml

from dfmspec.catalogue import SCHEMAS, Catalogue, catalogue, types
from dfmspec.diagnostics import Diagnostic, Path, Severity, Span, dotted
from dfmspec.document import Document, parse_document, read_document, read_scalar
from dfmspec.errors import UsageError
from dfmspec.recipes import RECIPES

COMMAND_LINE = "<command line>"
PATH_KEYS = frozenset({"dataset.path", "checkpoint.save", "checkpoint.load", "logger.tensorboard_dir", "run.output_dir"})
"""Keys whose relative values in a file are relative to that file."""

ALIASES = (("checkpoint_dir", "save"), ("load_checkpoint", "load"))
"""The how-to's names for keys of the checkpoint section."""

SHORT_NAMES = {
    "tp": "model.tensor_model_parallel_size", "pp": "model.pipeline_model_parallel_size",
    "cp": "model.context_parallel_size", "sp": "model.sequence_parallel", "gbs": "train.global_batch_size",
    "mbs": "train.micro_batch_size", "batch_size": "train.global_batch_size", "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr", "wd": "optimizer.weight_decay", "heads": "model.num_attention_heads",
    "layers": "model.num_layers", "iters": "train.train_iters", "max_steps": "train.train_iters", "seed": "rng.seed",
    "gpus": "cluster.nproc_per_node", "nodes": "cluster.nnodes", "dataset_path": "dataset.path",
    "tensor_parallelism": "model.tensor_model_parallel_size", "optim": "optimizer", "trainer": "train",
    "parallelism": "model", "warmup_iters": "scheduler.lr_warmup_iters",
}  # fmt: skip
"""Names that people write for keys: offered as "did you mean"."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from."""

    layer: str
    """"default", "recipe dit_xl", "spec", "extends", "config file", "flag", "override", "environment" or "derived"."""
    span: Span
    note: str = ""
    """For a derived value: from what."""

    @property
    def is_users(self) -> bool:
        """Whether a person set it, rather than a default, a recipe or a rule."""
        return self.layer in _USER_LAYERS


_USER_LAYERS = frozenset({"spec", "extends", "config file", "flag", "override", "environment"})


@dataclass(frozen=True)
class Spec:
    """The layers laid on one another: every key of the target has a value or None."""

    file: str
    name: str
    target: str
    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    problems: tuple[Diagnostic, ...]
    broken: frozenset[str]
    """Keys whose value was unusable; rules that ask for them are skipped."""
    overrides: tuple[str, ...] = ()
    documents: tuple[Document, ...] = field(default=(), repr=False)


def load_spec(
    file: str | FilePath | None,
    overrides: Sequence[str] = (),
    *,
    dataset_path: str | None = None,
    environment: Mapping[str, Any] | None = None,
    base: str | None = None,
) -> Spec:
    """Read a spec and everything it builds on.

    Args:
        file: the spec; None: defaults and overrides alone.
        overrides: `key=value`, as on the command line.
        dataset_path: the how-to's --dataset-path.
        base: the folder to which relative paths in files are relative, instead of each file's own.
        environment: values that the launcher's environment fixes, such as the world size under torchrun.

    Raises:
        OSError: the spec itself cannot be read.
        UsageError: an override is no `key=value`.
    """
    loader = _Loader(base)
    own = read_document(file) if file is not None else Document("<defaults>", "", data={})
    loader.lay_files(own)
    if dataset_path is not None:
        loader.lay("flag", {"dataset": {"path": dataset_path}}, Document("--dataset-path", ""))
    for override in overrides:
        loader.lay_override(override)
    for key, value in (environment or {}).items():
        loader.fixed[key] = value
    stem = FilePath(file).stem if file is not None else "dit_butterfly"
    return loader.finish(str(file) if file is not None else "<defaults>", stem, tuple(overrides))


@dataclass
class _Layer:
    """One layer, normalised, with the document that it came from."""

    kind: str
    data: dict[str, Any]
    document: Document


class _Loader:
    """Collects layers; `finish` lays them on one another."""

    def __init__(self, base: str | None) -> None:
        self.base = base
        self.layers: list[_Layer] = []
        self.problems: list[Diagnostic] = []
        self.documents: list[Document] = []
        self.fixed: dict[str, Any] = {}

    def lay_files(self, own: Document) -> None:
        """A spec with the files that lie under it: extends, then config_file, then its own keys."""
        self._lay_document(own, "spec", ancestors=())

    def _lay_document(self, document: Document, kind: str, ancestors: tuple[str, ...]) -> None:
        self.documents.append(document)
        self.problems.extend(document.problems)
        data = dict(document.data) if isinstance(document.data, dict) else {}
        extends = data.get("extends", [])
        bases = [extends] if isinstance(extends, str) else extends if isinstance(extends, list) else []
        references = [("extends", name) for name in bases] + [("config_file", data.get("config_file"))]
        for key, name in references:
            if isinstance(name, str):
                self._lay_reference(document, key, name, (*ancestors, os.path.realpath(document.file)))
        data.pop("config_file", None)
        data.pop("extends", None)
        self.lay(kind, data, document)

    def _lay_reference(self, document: Document, key: str, name: str, ancestors: tuple[str, ...]) -> None:
        path = FilePath(document.file).parent / name
        span = document.values.get((key,), document.span((key,)))
        if os.path.realpath(path) in ancestors:
            self._problem(span, "SPC105", "circular-extends", f"{name} is laid under itself", "remove one of the two references", (key,))
            return
        try:
            base = read_document(path)
        except OSError as error:
            message = f"{key}: {path} cannot be read: {error.strerror or error}"
            self._problem(span, "SPC104", "unreadable-base", message, "paths in a spec are relative to that spec", (key,))
            return
        self._lay_document(base, "extends" if key == "extends" else "config file", ancestors)

    def lay_override(self, text: str) -> None:
        """One `key=value` of the command line."""
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{text!r} is not key=value, such as model.tensor_model_parallel_size=2")
        node: Any = _OverrideText(value)
        for part in reversed(key.strip().split(".")):
            node = {part: node}
        self.lay("override", node, Document(COMMAND_LINE, ""))

    def lay(self, kind: str, data: dict[str, Any], document: Document) -> None:
        """Add a layer."""
        self.layers.append(_Layer(kind, data, document))

    def _problem(self, span: Span, code: str, name: str, message: str, hint: str, path: Path, severity: Severity = Severity.ERROR) -> None:
        self.problems.append(Diagnostic(span, code, name, severity, message, hint, path))

    def finish(self, file: str, stem: str, overrides: tuple[str, ...]) -> Spec:
        target = self._choice("target", tuple(SCHEMAS), "megatron_core")
        recipe = self._choice("recipe", tuple(RECIPES), "dit_xl")
        legal = catalogue(target)
        values: dict[str, Any] = {}
        origins: dict[str, Origin] = {}
        for key, default in legal.defaults():
            values[key], origins[key] = default, Origin("default", Span("<defaults>"))
        recipe_document = parse_document(RECIPES[recipe].read_bytes(), f"recipe {recipe}")
        broken: set[str] = set()
        recipe_layer = _Layer(f"recipe {recipe}", recipe_document.data, recipe_document)
        for layer in [recipe_layer, *self.layers]:
            trusted = layer is recipe_layer
            entries = list(_leaves(layer.data, legal) if trusted else self._checked(layer, legal, target, broken))
            for key, value, path in entries:
                if legal.field(key) is None:  # a recipe's key that this target does not have
                    continue
                values[key] = self._located(key, value, layer)
                origins[key] = Origin(layer.kind, _place(path, layer.document))
                broken.discard(key)
        for key, value in self.fixed.items():
            values[key], origins[key] = value, Origin("environment", Span("<environment>"))
        name = values["name"] or stem
        return Spec(
            file, name, target, values, origins, tuple(self.problems), frozenset(broken), overrides, tuple(self.documents)
        )

    def _choice(self, key: str, legal: tuple[str, ...], default: str) -> str:
        """`target` or `recipe`: needed before anything can be checked; an illegal one is reported with the rest."""
        for layer in reversed(self.layers):
            value = layer.data.get(key)
            text = value.text if isinstance(value, _OverrideText) else value
            if text is not None:
                return text if isinstance(text, str) and text in legal else default
        return default

    def _located(self, key: str, value: Any, layer: _Layer) -> Any:
        """A relative path in a file, as seen from the working directory."""
        if key not in PATH_KEYS or layer.kind not in ("spec", "extends", "config file") or not isinstance(value, str):
            return value
        if not value or value.startswith(("/", "~", "${")) or "://" in value:
            return value
        return os.path.relpath(FilePath(self.base or FilePath(layer.document.file).parent) / value)

    def _checked(self, layer: _Layer, legal: Catalogue, target: str, broken: set[str]) -> Iterator[tuple[str, Any, Path]]:
        """The layer's legal entries; what is not legal is reported."""
        data = self._aliased(layer)
        data = _typed_overrides(data, legal)
        for problem in _structural(data, layer.document, legal, target):
            self.problems.append(problem)
            if problem.path:
                broken.add(dotted(problem.path[:2]))
        for key, value, path in _leaves(data, legal):
            if legal.field(key) is not None and key not in broken:
                yield key, _canonical(value, legal.field(key) or {}), path

    def _aliased(self, layer: _Layer) -> dict[str, Any]:
        """With the how-to's own names for checkpoint keys turned into the real ones."""
        section = layer.data.get("checkpoint")
        if not isinstance(section, dict) or not {"checkpoint_dir", "load_checkpoint"} & section.keys():
            return layer.data
        section = dict(section)
        for alias, key in ALIASES:
            if alias not in section:
                continue
            value = section.pop(alias)
            span = layer.document.span(("checkpoint", alias)) if layer.document.text else Span(layer.document.file)
            self._problem(
                span, "CKP101", "documented-alias", f"checkpoint.{alias} is the how-to's name for checkpoint.{key}",
                f"write checkpoint.{key}; it is taken as that", ("checkpoint", alias), Severity.HINT,
            )  # fmt: skip
            text = value.text if isinstance(value, _OverrideText) else value
            if isinstance(text, str) and alias == "load_checkpoint":
                text, step = split_iteration(text)
                if step is not None:
                    section["ckpt_step"] = step
            section.setdefault(key, text)
        return {**layer.data, "checkpoint": section}


def _place(path: Path, document: Document) -> Span:
    """Where a layer sets a key: under its own name, or under the how-to's."""
    if not document.text:
        return Span(document.file)
    alias = next((("checkpoint", alias) for alias, key in ALIASES if path == ("checkpoint", key)), path)
    return document.span(path if path in document.keys or alias not in document.keys else alias)


def split_iteration(path: str) -> tuple[str, int | None]:
    """`ckpts/iter_5000/` as ("ckpts", 5000); any other path as (path, None)."""
    folder, _, last = path.rstrip("/").rpartition("/")
    if last.startswith("iter_") and last[5:].isdigit():
        return folder or ".", int(last[5:])
    return path, None


@dataclass(frozen=True, slots=True)
class _OverrideText:
    """The text after `=`: read by the type of its field, once that is known."""

    text: str


def _typed_overrides(node: Any, legal: Catalogue, path: tuple[str, ...] = ()) -> Any:
    if isinstance(node, dict):
        return {key: _typed_overrides(value, legal, (*path, key)) for key, value in node.items()}
    if not isinstance(node, _OverrideText):
        return node
    declared = types(legal.field(".".join(path)) or {})
    if node.text in ("null", "~") or "string" not in declared:
        return _flow(node.text)
    if "integer" in declared and isinstance(number := read_scalar(node.text), int):
        return number
    return node.text


def _flow(text: str) -> Any:
    """A scalar, or a list or mapping in flow style."""
    if text[:1] in "[{":
        try:
            return parse_document(f"value: {text}".encode(), COMMAND_LINE).data["value"]
        except (TypeError, KeyError, yaml.YAMLError):
            return text
    return read_scalar(text)


def _leaves(data: dict[str, Any], legal: Catalogue) -> Iterator[tuple[str, Any, Path]]:
    for name, node in data.items():
        if isinstance(node, dict) and legal.is_section(name):
            yield from ((f"{name}.{field}", value, (name, field)) for field, value in node.items())
        else:
            yield name, node, (name,)


def _canonical(value: Any, field: dict[str, Any]) -> Any:
    """A number field's integer as a float."""
    if isinstance(value, int) and not isinstance(value, bool) and "number" in types(field):
        return float(value)
    return value


# Structure: what the target's JSON Schema says, in our words.


def _structural(data: dict[str, Any], document: Document, legal: Catalogue, target: str) -> Iterator[Diagnostic]:
    for error in _validator(target).iter_errors(_json_like(data)):
        path = tuple(error.instance_path)
        kind = type(error.kind).__name__
        if kind == "AdditionalProperties":
            for name in error.kind.unexpected:
                yield _unknown_key((*path, name), document, legal, target)
        else:
            yield _bad_value(path, kind, error, data, document, legal)
    yield from _floats_for_integers(data, document, legal)


def _validator(target: str) -> Any:
    if target not in _VALIDATORS:
        import jsonschema_rs

        _VALIDATORS[target] = jsonschema_rs.validator_for(catalogue(target).schema)
    return _VALIDATORS[target]


_VALIDATORS: dict[str, Any] = {}


def _json_like(data: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(data, dict):
        return {str(key): _json_like(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_json_like(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)  # reported as a string where a number is needed
    if isinstance(data, int) and not isinstance(data, bool) and abs(data) >= 2**63:
        return str(data)
    return data


def _unknown_key(path: Path, document: Document, legal: Catalogue, target: str) -> Diagnostic:
    section, name = (str(path[0]), str(path[-1])) if len(path) > 1 else ("", str(path[0]))
    for other, catalogued in ((other, catalogue(other)) for other in SCHEMAS if other != target):
        if catalogued.field(dotted(path)) is not None:
            message = f"{dotted(path)} is a key of target {other}, not of {target}"
            return Diagnostic(
                document.span(path), "SPC206", "key-of-another-target", Severity.ERROR, message, f"remove it, or set target: {other}", path
            )
    known = legal.fields(section) if section else legal.top_level
    message = f"unknown key {dotted(path)}" if section else f"unknown section or key {name}"
    return Diagnostic(document.span(path), "SPC201", "unknown-key", Severity.ERROR, message, _did_you_mean(name, section, known, legal), path)


def _did_you_mean(name: str, section: str, known: Sequence[str], legal: Catalogue) -> str:
    if (short := SHORT_NAMES.get(name.lower())) and legal.field(short) is not None:
        return f"did you mean {short}?"
    if close := get_close_matches(name, known, n=1, cutoff=0.6):
        return f"did you mean {f'{section}.' if section else ''}{close[0]}?"
    elsewhere = [f"{other}.{name}" for other in legal.top_level if name in legal.fields(other)]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"known here: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"


def _bad_value(path: Path, kind: str, error: Any, data: dict[str, Any], document: Document, legal: Catalogue) -> Diagnostic:
    value: Any = data
    for part in path:
        value = value[part]
    field = legal.field(dotted(path[:2])) or legal.field(dotted(path[:1])) or {}
    key, shown = dotted(path) or "the spec", _shown(value)
    span = document.values.get(path, document.span(path))
    if kind == "Type" and "properties" in field and len(path) == 1:
        keys = ", ".join(legal.fields(str(path[0]))[:8])
        return Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} is a section with keys, not {shown}", f"its keys: {keys}, ...", path)
    if kind == "Type":
        need = " or ".join(_TYPE_WORDS[name] for name in types(field)) or "another type"
        return Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} must be {need}, not {shown}", _retype(value, field), path)
    if kind == "Enum":
        options = ", ".join("null" if option is None else str(option) for option in field.get("enum", ()))
        close = get_close_matches(str(value), [str(option) for option in field.get("enum", ()) if option is not None], n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of: {options}"
        return Diagnostic(span, "SPC203", "value-not-allowed", Severity.ERROR, f"{key} must be one of {options}, not {shown}", hint, path)
    limits = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
    need = " and ".join(f"{words} {field[name]}" for name, words in limits.items() if name in field)
    message = f"{key} must be {need}, not {shown}" if need else f"{key}: {error.message}"
    hint = f"for example {field['default']}" if field.get("default") is not None else "see its description in the schema"
    return Diagnostic(span, "SPC204", "value-out-of-range", Severity.ERROR, message, hint, path)


_TYPE_WORDS = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false", "null": "null",
               "object": "a section", "array": "a list"}  # fmt: skip


def _shown(value: Any) -> str:
    """A value as a person would say it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'the text "{value}"' if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _retype(value: Any, field: dict[str, Any]) -> str:
    """A way out of a wrong type."""
    if isinstance(value, str):
        as_scalar = read_scalar(value)
        if not isinstance(as_scalar, str) and as_scalar is not None:
            return f"write {_shown(as_scalar)} without quotes"
        if "boolean" in types(field):
            return "YAML 1.2 knows true and false only"
    if "string" in types(field):
        return "put it in quotes"
    return f"for example {field['default']}" if field.get("default") is not None else "remove the key to have it derived"


def _floats_for_integers(data: dict[str, Any], document: Document, legal: Catalogue) -> Iterator[Diagnostic]:
    """JSON Schema takes 2.0 for an integer; Megatron does not."""
    for key, value, path in _leaves(data, legal):
        field = legal.field(key)
        if field and isinstance(value, float) and value.is_integer() and "integer" in types(field) and "number" not in types(field):
            span = document.values.get(path, document.span(path))
            yield Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} must be an integer, not {value}", f"write {int(value)}", path)
