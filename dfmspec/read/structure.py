"""What a target's JSON Schema says of a layer, in our words: unknown keys, types, allowed values, ranges."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from difflib import SequenceMatcher, get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from dfmspec.diagnostics import Diagnostic, Edit, Path, Severity, Span, dotted
from dfmspec.read.document import Budget, Document, read_scalar
from dfmspec.read.interpolation import SYNTAX
from dfmspec.spec.catalogue import Catalogue, types
from dfmspec.spec.units import has_some_unit, in_words
from dfmspec.targets import TARGETS, catalogue
from dfmspec.targets.renames import RENAMES

SHORT_NAMES = {
    "tp": "model.tensor_model_parallel_size",
    "pp": "model.pipeline_model_parallel_size",
    "cp": "model.context_parallel_size",
    "sp": "model.sequence_parallel",
    "vpp": "model.virtual_pipeline_model_parallel_size",
    "tensor_parallelism": "model.tensor_model_parallel_size",
    "pipeline_parallelism": "model.pipeline_model_parallel_size",
    "context_parallelism": "model.context_parallel_size",
    "tensor_parallel_size": "model.tensor_model_parallel_size",
    "pipeline_parallel_size": "model.pipeline_model_parallel_size",
    "sequence_parallelism": "model.sequence_parallel",
    "heads": "model.num_attention_heads",
    "num_heads": "model.num_attention_heads",
    "n_heads": "model.num_attention_heads",
    "layers": "model.num_layers",
    "n_layers": "model.num_layers",
    "depth": "model.num_layers",
    "hidden_dim": "model.hidden_size",
    "d_model": "model.hidden_size",
    "ffn_dim": "model.ffn_hidden_size",
    "gbs": "train.global_batch_size",
    "mbs": "train.micro_batch_size",
    "batch_size": "train.global_batch_size",
    "iters": "train.train_iters",
    "max_steps": "train.train_iters",
    "num_steps": "train.train_iters",
    "steps": "train.train_iters",
    "eval_every": "train.eval_interval",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "grad_clip": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "warmup_iters": "scheduler.lr_warmup_iters",
    "warmup_steps": "scheduler.lr_warmup_iters",
    "decay_iters": "scheduler.lr_decay_iters",
    "schedule": "scheduler.lr_decay_style",
    "seed": "rng.seed",
    "random_seed": "rng.seed",
    "gpus": "cluster.nproc_per_node",
    "nproc": "cluster.nproc_per_node",
    "nodes": "cluster.nnodes",
    "dataset_path": "dataset.path",
    "data_path": "dataset.path",
    "workers": "dataset.num_workers",
    "seq_len": "dataset.task_encoder_seq_length",
    "pack_length": "dataset.task_encoder_seq_length",
    "dir": "checkpoint.save",
    "interval": "checkpoint.save_interval",
    "save_every": "checkpoint.save_interval",
    "keep": "checkpoint.most_recent_k",
    "project": "logger.wandb_project",
    "precision": "mixed_precision",
    "optim": "optimizer",
    "trainer": "train",
    "training": "train",
    "parallelism": "model",
    "ckpt": "checkpoint",
    "logging": "logger",
    "lr_scheduler": "scheduler",
    "distributed": "dist",
}
"""Names that people write for keys: offered as "did you mean"."""
_TYPE_WORDS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "a section",
    "array": "a list",
}
_LIMIT_WORDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}
_TRUTH = {
    "y": True,
    "yes": True,
    "on": True,
    "true": True,
    "n": False,
    "no": False,
    "off": False,
    "false": False,
}
"""Words that YAML 1.1, or a person, takes for a boolean."""
_ANY_FORM = "letters, digits, dot, hyphen and underscore"
_MOST_KEYS = 12
"""How many known keys a hint lists."""

Fix = tuple[Edit, ...]
"""The edits that mend a finding together."""


def structural_findings(
    data: dict[str, Any],
    document: Document,
    legal: Catalogue,
    target: str,
    budget: Budget,
) -> Iterator[Diagnostic]:
    """Every structural finding of one layer; the budget says for how many a near spelling is looked for."""
    pointers = _Pointers(data)
    for error in _validator(target).iter_errors(_json_like(data)):
        path = pointers.path(error.instance_path)
        kind = type(error.kind).__name__
        if kind == "AdditionalProperties":
            for name in error.kind.unexpected:
                yield _unknown_key((*path, name), document, legal, target, budget)
        else:
            yield _bad_value(path, kind, error.message, data, document, legal, budget)
    yield from _bad_names(data, document, legal)
    yield from _remarks(data, document, legal)


# From the data to the validator, and back.


class _Pointers:
    """From the validator's paths to those of the data: it takes a key of digits for an index."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._keys: dict[int, dict[int, str]] = {}
        """For a mapping, by its id: the keys that are indices to the validator."""

    def path(self, pointer: list[str | int]) -> Path:
        """A path as the data has it, as far as the data has it."""
        data = self._data
        path: list[str | int] = []
        for part in pointer:
            key: str | int | None = part
            if isinstance(data, dict) and part not in data:
                key = self._keys_of(data).get(part) if isinstance(part, int) else None
            if key is None:
                break
            path.append(key)
            data = data[key]
        return tuple(path)

    def _keys_of(self, data: dict[str, Any]) -> dict[int, str]:
        """The first key of each index: "8" and "+8" are both 8 to the validator."""
        if id(data) not in self._keys:
            indices = [name for name in data if _INDEX.fullmatch(name)]
            self._keys[id(data)] = {int(name): name for name in reversed(indices)}
        return self._keys[id(data)]


_INDEX = re.compile(r"\+?[0-9]{1,20}")


@lru_cache
def _validator(target: str) -> Any:
    """The validator of a target's schema."""
    import jsonschema_rs

    return jsonschema_rs.validator_for(_without_names(catalogue(target).schema))


def _without_names(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that says nothing of free names: with each bad one the validator keeps all, which is `_bad_names`'s."""
    kept = {word: value for word, value in schema.items() if word != "propertyNames"}
    if "properties" in schema:
        kept["properties"] = {name: _without_names(field) for name, field in schema["properties"].items()}
    return kept


def _json_like(data: Any) -> Any:
    """The data without what JSON has no word for; as strings, which are reported where a number is needed."""
    if isinstance(data, dict):
        return {_printable(str(key)): _json_like(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_json_like(value) for value in data]
    if isinstance(data, str):
        return _printable(data)
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    # The validator's integers have 64 bits.
    if isinstance(data, int) and not isinstance(data, bool) and abs(data) >= 2**63:
        return str(data)
    return data


def _printable(text: str) -> str:
    """A text without bytes of the command line that are no UTF-8, which the validator cannot show."""
    if text.isascii():
        return text
    return text.encode(errors="replace").decode()


# Keys.


def _bad_names(data: dict[str, Any], document: Document, legal: Catalogue) -> Iterator[Diagnostic]:
    """Free names, such as those of environment variables, in letters that they cannot have."""
    for key, value, path in layer_entries(data, legal):
        form = (legal.field(key) or {}).get("propertyNames")
        if form is None or not isinstance(value, dict):
            continue
        for name in map(_printable, value):
            if re.fullmatch(form["pattern"], name) is None:
                yield _bad_name(path, name, document)


def _bad_name(path: Path, name: str, document: Document) -> Diagnostic:
    """A free name in letters that it cannot have."""
    place = (*path, name)
    return Diagnostic(
        document.span(place),
        "SPC204",
        "value-out-of-range",
        Severity.ERROR,
        f"{dotted(path)}: {name!r} cannot be a name there",
        "ASCII letters, digits and underscores, and no digit first",
        place,
    )


def _unknown_key(path: Path, document: Document, legal: Catalogue, target: str, budget: Budget) -> Diagnostic:
    """A key that the target does not have, with the one that was probably meant."""
    # A key of another target. A dotted key at the top may name one of this target, and is only to be nested.
    key = dotted(path)
    other = _target_that_has(key, target)
    if other is not None and legal.field(key) is None:
        return Diagnostic(
            document.span(path),
            "SPC206",
            "key-of-another-target",
            Severity.ERROR,
            f"{key} is a key of target {other}, not of {target}",
            f"remove it, or set target: {other}",
            path,
        )

    # A key of none.
    name = str(path[-1])
    if len(path) > 1:
        section = str(path[0])
        message = f"unknown key {key}"
    else:
        section = ""
        message = f"unknown section or key {name}"
    meant = _known_elsewhere(name, target)
    if meant is None and budget.may_search():
        meant = meant_key(name, section, target)
    return Diagnostic(
        document.span(path),
        "SPC201",
        "unknown-key",
        Severity.ERROR,
        message,
        _hint_for_unknown(name, section, meant, legal, target),
        path,
        fix=_rename_to(meant, section, path, document),
    )


def _target_that_has(key: str, target: str) -> str | None:
    """Another target that has a key; None when there is none."""
    for other in TARGETS:
        if other != target and catalogue(other).field(key) is not None:
            return other
    return None


def _hint_for_unknown(name: str, section: str, meant: str | None, legal: Catalogue, target: str) -> str:
    """What to write instead of an unknown key."""
    renames = RENAMES.get((target, TARGETS[target].revision), {})
    key = f"{section}.{name}" if section else name
    if any(old == key or old.startswith(f"{key}.") for old in renames):
        return (
            f"another version of {target} has it; dfmspec fix --upgrade writes the names of {TARGETS[target].revision}"
        )
    if not section and "." in name and legal.field(name) is not None:
        parts = name.split(".")
        return f"nest it: {parts[0]}: {{{parts[1]}: ...}}; a dotted key is one key to YAML"
    if meant:
        return f"did you mean {meant}?"
    known = legal.fields(section) if section else legal.top_level
    listed = ", ".join(known[:_MOST_KEYS])
    more = ", ..." if len(known) > _MOST_KEYS else ""
    return f"known here: {listed}{more}"


def _rename_to(meant: str | None, section: str, path: Path, document: Document) -> Fix:
    """The renaming of a key to the one that was meant, where that is in its own section and not there already."""
    if not meant:
        return ()
    meant_section, _, new_name = meant.rpartition(".")
    is_there = (*path[:-1], new_name) in document.keys
    if meant_section != section or is_there:
        return ()
    # A spelling that is less near may be another word: such an edit is made with --unsafe only.
    name = str(path[-1])
    is_usual = name.lower() in SHORT_NAMES
    is_near = SequenceMatcher(None, name, new_name).ratio() >= 0.85
    return (Edit("rename", path, new_name, safe=is_usual or is_near),)


def _known_elsewhere(name: str, target: str) -> str | None:
    """The key that a usual short name stands for; or that of the same name in another section."""
    short = SHORT_NAMES.get(name.lower())
    if short and catalogue(target).field(short) is not None:
        return short
    return _keys_by_name(target).get(name)


@lru_cache
def _keys_by_name(target: str) -> dict[str, str]:
    """Each name of a field, and the first key that has it."""
    legal = catalogue(target)
    keys: dict[str, str] = {}
    for section in legal.top_level:
        for name in legal.fields(section):
            keys.setdefault(name, f"{section}.{name}")
    return keys


@lru_cache(maxsize=1024)
def meant_key(name: str, section: str, target: str) -> str | None:
    """The key that an unknown one was probably meant for.

    In this order: a usual short name, the name in another section, a near spelling in its own section.
    """
    elsewhere = _known_elsewhere(name, target)
    if elsewhere is not None:
        return elsewhere
    legal = catalogue(target)
    if section:
        dot = f"{section}."
        known = legal.fields(section)
    else:
        dot = ""
        known = legal.top_level
    # A key that changes nothing is offered only where no other is near.
    useful = [name for name in known if not _is_useless(f"{dot}{name}", legal)]
    for names in (useful, known):
        close = get_close_matches(name, names, n=1, cutoff=0.6)
        if close:
            return f"{dot}{close[0]}"
    return None


def _is_useless(key: str, legal: Catalogue) -> bool:
    """Whether a key changes nothing upstream."""
    field = legal.field(key) or {}
    return "x-no-effect" in field


# Values.


class _Refused(NamedTuple):
    """A value that the schema refuses."""

    path: Path
    span: Span
    value: Any
    field: dict[str, Any]
    """The schema of the key, or of the inner value that is refused."""
    message: str
    """What the validator says."""

    @property
    def key(self) -> str:
        """The path as a message names it."""
        return dotted(self.path) or "the spec"

    @property
    def said(self) -> str:
        """The value as a message names it."""
        return _in_words(self.value)

    def finding(
        self,
        code: str,
        name: str,
        message: str,
        hint: str,
        fix: Fix = (),
    ) -> Diagnostic:
        """An error at the place of the value."""
        return Diagnostic(
            self.span,
            code,
            name,
            Severity.ERROR,
            message,
            hint,
            self.path,
            fix=fix,
        )


def _bad_value(
    path: Path,
    kind: str,
    said: str,
    data: dict[str, Any],
    document: Document,
    legal: Catalogue,
    budget: Budget,
) -> Diagnostic:
    """What is wrong with a value, of which the validator says the kind of its fault and a message."""
    value: Any = data
    for part in path:
        value = value[part]
    field = _field_of(path, legal)
    refused = _Refused(
        path=path,
        span=document.values.get(path, document.span(path)),
        value=value,
        field=field,
        message=said,
    )
    is_section = "properties" in field and len(path) == 1
    if kind == "Type" and is_section:
        return _not_a_section(refused, legal)
    # Whatever else is wrong with it, nothing can be right.
    if "x-callable" in field:
        return _function(refused)
    if kind == "Enum":
        return _not_among(refused, budget)
    explain = _EXPLAINED.get(kind, _out_of_range)
    return explain(refused)


def _field_of(path: Path, legal: Catalogue) -> dict[str, Any]:
    """The schema of the value at a path; of an entry of a list or a free mapping, that of every entry."""
    field = legal.field(dotted(path[:2]))
    if not field:
        field = legal.field(dotted(path[:1])) or {}
    for part in path[2:]:
        named = field.get("properties", {}).get(part)
        every = [field.get(name) for name in ("additionalProperties", "items")]
        inner = next((node for node in (named, *every) if isinstance(node, dict)), None)
        if inner is None:
            break
        field = inner
    return field


def _not_a_section(refused: _Refused, legal: Catalogue) -> Diagnostic:
    """A section that is no mapping."""
    section = str(refused.path[0])
    keys = ", ".join(legal.fields(section)[:8])
    return refused.finding(
        "SPC202",
        "wrong-type",
        f"{refused.key} is a section with keys, not {refused.said}",
        f"its keys: {keys}, ...",
    )


def _function(refused: _Refused) -> Diagnostic:
    """A field of upstream's that takes a Python function."""
    return refused.finding(
        "SPC205",
        "key-not-settable",
        f"{refused.key} holds a function, which no file can give",
        "remove it; upstream keeps its own",
    )


def _wrong_type(refused: _Refused) -> Diagnostic:
    """A value of another type."""
    words = [_TYPE_WORDS[name] for name in types(refused.field)]
    need = " or ".join(words) or "another type"
    hint, fix = _retype(refused.value, refused.field, refused.path)
    return refused.finding(
        "SPC202",
        "wrong-type",
        f"{refused.key} must be {need}, not {refused.said}",
        hint,
        fix,
    )


def _not_among(refused: _Refused, budget: Budget) -> Diagnostic:
    """A word that is none of the field's."""
    allowed = refused.field.get("enum", ())
    words = [str(option) for option in allowed if option is not None]
    options = ", ".join("null" if option is None else str(option) for option in allowed)
    hint = f"one of: {options}"
    close = get_close_matches(str(refused.value), words, n=1) if budget.may_search() else []
    if close:
        hint = f"did you mean {close[0]}?"
    return refused.finding(
        "SPC203",
        "value-not-allowed",
        f"{refused.key} must be one of {options}, not {refused.said}",
        hint,
    )


def _wrong_form(refused: _Refused) -> Diagnostic:
    """A text that the field's pattern does not match."""
    return refused.finding(
        "SPC204",
        "value-out-of-range",
        f"{refused.key} {refused.said} has characters that it may not have",
        refused.field.get("x-form", _ANY_FORM),
    )


def _out_of_range(refused: _Refused) -> Diagnostic:
    """A number beyond a limit; for any other kind of fault, in the validator's own words."""
    field = refused.field
    limits = [f"{words} {field[name]}" for name, words in _LIMIT_WORDS.items() if name in field]
    message = f"{refused.key}: {refused.message}"
    if limits:
        need = " and ".join(limits)
        message = f"{refused.key} must be {need}, not {refused.said}"
    hint = "see its description in the schema"
    if field.get("default") is not None:
        hint = f"for example {field['default']}"
    return refused.finding("SPC204", "value-out-of-range", message, hint)


_EXPLAINED = {
    "Type": _wrong_type,
    "Pattern": _wrong_form,
}
"""By the validator's kind of fault; any other one is a range."""


def _in_words(value: Any) -> str:
    """A value as a person would say it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f'the text "{value[:60]}"' if isinstance(value, str) else repr(value)
    if len(text) > 60:
        return text[:57] + "..."
    return text


def _retype(value: Any, field: dict[str, Any], path: Path) -> tuple[str, Fix]:
    """A way out of a wrong type, in words and, where it is certain, as an edit."""
    legal = types(field)
    if isinstance(value, str):
        # What would have been filled in, or counted.
        if "${" in value:
            return f"a spec refers by {SYNTAX}", ()
        if has_some_unit(value) and {"integer", "number"} & {*legal}:
            return in_words(field), ()
        # A number in quotes.
        unquoted = read_scalar(value)
        if _is_of(unquoted, legal):
            hint = f"write {_in_words(unquoted)} without quotes"
            return hint, (Edit("set", path, unquoted),)
        # A word that is a boolean to YAML 1.1, and so to upstream.
        if "boolean" in legal:
            hint = "YAML 1.2 knows true and false only"
            meant = _TRUTH.get(value.lower())
            if meant is None:
                return hint, ()
            return hint, (Edit("set", path, meant),)
    if value is None:
        return "remove the key", ()
    if "string" in legal:
        return "put it in quotes", ()
    if field.get("default") is not None:
        return f"for example {field['default']}", ()
    return "remove the key to have it derived", ()


def _is_of(value: Any, legal: tuple[str, ...]) -> bool:
    """Whether a scalar is a boolean or a number, and of a legal type; an integer is a number too."""
    if isinstance(value, bool):
        return "boolean" in legal
    if isinstance(value, int):
        return "integer" in legal or "number" in legal
    return isinstance(value, float) and "number" in legal


def _remarks(data: dict[str, Any], document: Document, legal: Catalogue) -> Iterator[Diagnostic]:
    """What JSON Schema does not see: 2.0 for an integer, and the word None."""
    for key, value, path in layer_entries(data, legal):
        field = legal.field(key)
        if field is None:
            continue
        span = document.values.get(path, document.span(path))
        declared = types(field)
        # The same number, written as the field wants it.
        if _is_whole(value) and "integer" in declared and "number" not in declared:
            whole = int(value)
            yield Diagnostic(
                span,
                "SPC202",
                "wrong-type",
                Severity.ERROR,
                f"{key} must be an integer, not {value}",
                f"write {whole}",
                path,
                fix=(Edit("set", path, whole),),
            )
        elif "string" in declared and _passed_for_text(value):
            yield Diagnostic(
                span,
                "SPC202",
                "wrong-type",
                Severity.ERROR,
                f"{key} must be text, not {value}",
                "put it in quotes",
                path,
            )
        elif "string" in declared and value in ("None", "none"):
            yield Diagnostic(
                span,
                "SPC103",
                "ambiguous-scalar",
                Severity.WARNING,
                f"{key} is the text {value}, not null",
                "write null, or another word if it is a name",
                path,
                fix=(Edit("set", path, None),),
            )


def _is_whole(value: Any) -> bool:
    """Whether a value is 2.0, which JSON Schema takes for an integer."""
    return isinstance(value, float) and value.is_integer()


def _passed_for_text(value: Any) -> bool:
    """Whether a value is a number that the validator was given as a string."""
    return isinstance(value, int | float) and isinstance(_json_like(value), str)


def layer_entries(data: dict[str, Any], legal: Catalogue) -> Iterator[tuple[str, Any, Path]]:
    """(key, value, path) of every entry of a layer: `section.field`, or a top-level key."""
    for name, node in data.items():
        if isinstance(node, dict) and legal.is_section(name):
            for field, value in node.items():
                yield f"{name}.{field}", value, (name, field)
        else:
            yield name, node, (name,)
