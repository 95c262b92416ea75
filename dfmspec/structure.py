"""What a target's JSON Schema says of a layer, in our words: unknown keys, types, allowed values, ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from dfmspec.catalogue import SCHEMAS, Catalogue, catalogue, types
from dfmspec.diagnostics import Diagnostic, Path, Severity, dotted
from dfmspec.document import Document, read_scalar

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


def structural_findings(data: dict[str, Any], document: Document, legal: Catalogue, target: str) -> Iterator[Diagnostic]:
    """Every structural finding of one layer."""
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
    for key, value, path in leaves(data, legal):
        field = legal.field(key)
        if field and isinstance(value, float) and value.is_integer() and "integer" in types(field) and "number" not in types(field):
            span = document.values.get(path, document.span(path))
            yield Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} must be an integer, not {value}", f"write {int(value)}", path)


def leaves(data: dict[str, Any], legal: Catalogue) -> Iterator[tuple[str, Any, Path]]:
    """(key, value, path) of every entry of a layer: `section.field`, or a top-level key."""
    for name, node in data.items():
        if isinstance(node, dict) and legal.is_section(name):
            yield from ((f"{name}.{field}", value, (name, field)) for field, value in node.items())
        else:
            yield name, node, (name,)
