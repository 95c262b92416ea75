"""What a target's JSON Schema says of a layer, in our words: unknown keys, types, allowed values, ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache
from typing import Any

from dfmspec.diagnostics import Diagnostic, Edit, Path, Severity, dotted
from dfmspec.read.document import Document, read_scalar
from dfmspec.spec.catalogue import Catalogue, types
from dfmspec.targets import TARGETS, catalogue

SHORT_NAMES = {
    "tp": "model.tensor_model_parallel_size", "pp": "model.pipeline_model_parallel_size", "cp": "model.context_parallel_size",
    "sp": "model.sequence_parallel", "vpp": "model.virtual_pipeline_model_parallel_size", "tensor_parallelism": "model.tensor_model_parallel_size",
    "pipeline_parallelism": "model.pipeline_model_parallel_size", "context_parallelism": "model.context_parallel_size",
    "tensor_parallel_size": "model.tensor_model_parallel_size", "pipeline_parallel_size": "model.pipeline_model_parallel_size",
    "sequence_parallelism": "model.sequence_parallel", "heads": "model.num_attention_heads", "num_heads": "model.num_attention_heads",
    "n_heads": "model.num_attention_heads", "layers": "model.num_layers", "n_layers": "model.num_layers", "depth": "model.num_layers",
    "hidden_dim": "model.hidden_size", "d_model": "model.hidden_size", "ffn_dim": "model.ffn_hidden_size",
    "gbs": "train.global_batch_size", "mbs": "train.micro_batch_size", "batch_size": "train.global_batch_size", "iters": "train.train_iters",
    "max_steps": "train.train_iters", "num_steps": "train.train_iters", "steps": "train.train_iters", "eval_every": "train.eval_interval",
    "learning_rate": "optimizer.lr", "lr": "optimizer.lr", "wd": "optimizer.weight_decay", "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2", "grad_clip": "optimizer.clip_grad", "max_grad_norm": "optimizer.clip_grad",
    "warmup_iters": "scheduler.lr_warmup_iters", "warmup_steps": "scheduler.lr_warmup_iters", "decay_iters": "scheduler.lr_decay_iters",
    "schedule": "scheduler.lr_decay_style", "seed": "rng.seed", "random_seed": "rng.seed", "gpus": "cluster.nproc_per_node",
    "nproc": "cluster.nproc_per_node", "nodes": "cluster.nnodes", "dataset_path": "dataset.path", "data_path": "dataset.path",
    "workers": "dataset.num_workers", "seq_len": "dataset.task_encoder_seq_length", "pack_length": "dataset.task_encoder_seq_length",
    "dir": "checkpoint.save", "interval": "checkpoint.save_interval", "save_every": "checkpoint.save_interval", "keep": "checkpoint.most_recent_k",
    "project": "logger.wandb_project", "precision": "mixed_precision", "optim": "optimizer", "trainer": "train", "training": "train",
    "parallelism": "model", "ckpt": "checkpoint", "logging": "logger", "lr_scheduler": "scheduler", "distributed": "dist",
}  # fmt: skip
"""Names that people write for keys: offered as "did you mean"."""


def structural_findings(data: dict[str, Any], document: Document, legal: Catalogue, target: str) -> Iterator[Diagnostic]:
    """Every structural finding of one layer."""
    for error in _validator(target).iter_errors(_json_like(data)):
        path = _path_in(data, error.instance_path)
        kind = type(error.kind).__name__
        if kind == "AdditionalProperties":
            for name in error.kind.unexpected:
                yield _unknown_key((*path, name), document, legal, target)
        elif kind == "PropertyNames":
            name = error.kind.error.instance
            message = f"{dotted(path)}: {name!r} cannot be a name there"
            hint = "ASCII letters, digits and underscores, and no digit first"
            yield Diagnostic(document.span((*path, name)), "SPC204", "value-out-of-range", Severity.ERROR, message, hint, (*path, name))
        else:
            yield _bad_value(path, kind, error, data, document, legal)
    yield from _remarks(data, document, legal)


def _path_in(data: Any, pointer: list[str | int]) -> Path:
    """A path as the data has it: the validator takes a key of digits for an index."""
    path: list[str | int] = []
    for part in pointer:
        if isinstance(data, dict) and part not in data:
            same = [key for key in data if key.isascii() and key.lstrip("+").isdigit() and int(key) == part]
            if not same:
                break
            part = same[0]  # noqa: PLW2901
        path.append(part)
        data = data[part]
    return tuple(path)


def _validator(target: str) -> Any:
    if target not in _VALIDATORS:
        import jsonschema_rs

        _VALIDATORS[target] = jsonschema_rs.validator_for(catalogue(target).schema)
    return _VALIDATORS[target]


_VALIDATORS: dict[str, Any] = {}


def _json_like(data: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(data, dict):
        return {_text(str(key)): _json_like(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_json_like(value) for value in data]
    if isinstance(data, str):
        return _text(data)
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)  # reported as a string where a number is needed
    if isinstance(data, int) and not isinstance(data, bool) and abs(data) >= 2**63:
        return str(data)
    return data


def _text(text: str) -> str:
    """Without bytes of the command line that are no UTF-8, which the validator cannot show."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def _unknown_key(path: Path, document: Document, legal: Catalogue, target: str) -> Diagnostic:
    section, name = (str(path[0]), str(path[-1])) if len(path) > 1 else ("", str(path[0]))
    for other, catalogued in ((other, catalogue(other)) for other in TARGETS if other != target and legal.field(dotted(path)) is None):
        if catalogued.field(dotted(path)) is not None:
            message = f"{dotted(path)} is a key of target {other}, not of {target}"
            return Diagnostic(
                document.span(path), "SPC206", "key-of-another-target", Severity.ERROR, message, f"remove it, or set target: {other}", path
            )
    message = f"unknown key {dotted(path)}" if section else f"unknown section or key {name}"
    meant = meant_key(name, section, target)
    known = legal.fields(section) if section else legal.top_level
    if not section and "." in name and legal.field(name) is not None:
        hint = f"nest it: {name.split('.')[0]}: {{{name.split('.')[1]}: ...}}; a dotted key is one key to YAML"
    else:
        hint = f"did you mean {meant}?" if meant else f"known here: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    fix: tuple[Edit, ...] = ()
    if meant and meant.rpartition(".")[0] == section and (*path[:-1], meant.rpartition(".")[2]) not in document.keys:
        certain = name.lower() in SHORT_NAMES or SequenceMatcher(None, name, meant.rpartition(".")[2]).ratio() >= 0.85
        fix = (Edit("rename", path, meant.rpartition(".")[2], safe=certain),)
    return Diagnostic(document.span(path), "SPC201", "unknown-key", Severity.ERROR, message, hint, path, fix=fix)


@lru_cache(maxsize=1024)
def meant_key(name: str, section: str, target: str) -> str | None:
    """The key that an unknown one was probably meant for: a usual short name, the same name elsewhere, a near spelling here."""
    legal = catalogue(target)
    if (short := SHORT_NAMES.get(name.lower())) and legal.field(short) is not None:
        return short
    dot = f"{section}." if section else ""
    if elsewhere := next((f"{other}.{name}" for other in legal.top_level if name in legal.fields(other)), None):
        return elsewhere
    known = legal.fields(section) if section else legal.top_level
    useful = [field for field in known if "x-no-effect" not in (legal.field(f"{dot}{field}") or {})]
    for names in (useful, known):
        if close := get_close_matches(name, names, n=1, cutoff=0.6):
            return f"{dot}{close[0]}"
    return None


def _bad_value(path: Path, kind: str, error: Any, data: dict[str, Any], document: Document, legal: Catalogue) -> Diagnostic:
    value: Any = data
    for part in path:
        value = value[part]
    field = legal.field(dotted(path[:2])) or legal.field(dotted(path[:1])) or {}
    if len(path) > 2:
        field = next((inner for name in ("additionalProperties", "items") if isinstance(inner := field.get(name), dict)), field)
    key, shown = dotted(path) or "the spec", _shown(value)
    span = document.values.get(path, document.span(path))
    if kind == "Type" and "properties" in field and len(path) == 1:
        keys = ", ".join(legal.fields(str(path[0]))[:8])
        return Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} is a section with keys, not {shown}", f"its keys: {keys}, ...", path)
    if "x-callable" in field:
        message = f"{key} holds a function, which no file can give"
        return Diagnostic(span, "SPC205", "key-not-settable", Severity.ERROR, message, "remove it; upstream keeps its own", path)
    if kind == "Type":
        need = " or ".join(_TYPE_WORDS[name] for name in types(field)) or "another type"
        hint, fix = _retype(value, field, path)
        return Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} must be {need}, not {shown}", hint, path, fix=fix)
    if kind == "Enum":
        options = ", ".join("null" if option is None else str(option) for option in field.get("enum", ()))
        close = get_close_matches(str(value), [str(option) for option in field.get("enum", ()) if option is not None], n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of: {options}"
        return Diagnostic(span, "SPC203", "value-not-allowed", Severity.ERROR, f"{key} must be one of {options}, not {shown}", hint, path)
    if kind == "Pattern":
        message = f"{key} {shown} has characters that it may not have"
        form = field.get("x-form", "letters, digits, dot, hyphen and underscore")
        return Diagnostic(span, "SPC204", "value-out-of-range", Severity.ERROR, message, form, path)
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


_TRUTH = {"y": True, "yes": True, "on": True, "true": True, "n": False, "no": False, "off": False, "false": False}


def _retype(value: Any, field: dict[str, Any], path: Path) -> tuple[str, tuple[Edit, ...]]:
    """A way out of a wrong type, in words and, where it is certain, as an edit."""
    if isinstance(value, str):
        as_scalar = read_scalar(value)
        if not isinstance(as_scalar, str) and as_scalar is not None:
            kind = {bool: "boolean", int: "integer", float: "number"}[type(as_scalar)]
            if kind in types(field) or (kind == "integer" and "number" in types(field)):
                return f"write {_shown(as_scalar)} without quotes", (Edit("set", path, as_scalar),)
        if "boolean" in types(field):
            known = value.lower() in _TRUTH
            return "YAML 1.2 knows true and false only", (Edit("set", path, _TRUTH[value.lower()]),) if known else ()
    if value is None:
        return "remove the key", ()
    if "string" in types(field):
        return "put it in quotes", ()
    return f"for example {field['default']}" if field.get("default") is not None else "remove the key to have it derived", ()


def _remarks(data: dict[str, Any], document: Document, legal: Catalogue) -> Iterator[Diagnostic]:
    """What JSON Schema does not see: 2.0 for an integer, and the word None."""
    for key, value, path in leaves(data, legal):
        field = legal.field(key)
        if field is None:
            continue
        span = document.values.get(path, document.span(path))
        if isinstance(value, float) and value.is_integer() and "integer" in types(field) and "number" not in types(field):
            yield Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} must be an integer, not {value}", f"write {int(value)}", path,
                             fix=(Edit("set", path, int(value)),))  # fmt: skip
        elif "string" in types(field) and isinstance(value, int | float) and isinstance(_json_like(value), str):  # as text, it passed the schema
            yield Diagnostic(span, "SPC202", "wrong-type", Severity.ERROR, f"{key} must be text, not {value}", "put it in quotes", path)
        elif value in ("None", "none") and "string" in types(field):
            message, hint = f"{key} is the text {value}, not null", "write null, or another word if it is a name"
            yield Diagnostic(span, "SPC103", "ambiguous-scalar", Severity.WARNING, message, hint, path, fix=(Edit("set", path, None),))


def leaves(data: dict[str, Any], legal: Catalogue) -> Iterator[tuple[str, Any, Path]]:
    """(key, value, path) of every entry of a layer: `section.field`, or a top-level key."""
    for name, node in data.items():
        if isinstance(node, dict) and legal.is_section(name):
            yield from ((f"{name}.{field}", value, (name, field)) for field, value in node.items())
        else:
            yield name, node, (name,)
