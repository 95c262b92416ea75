"""From files and overrides to a Spec: one value per key, the origin of each, and every structural finding.

Layers, lowest first: the target's defaults, the recipe, `extends` left to right, `config_file`, the spec's own keys,
flags, `key=value`. Every layer is checked alike: unknown keys, types and ranges are errors wherever they stand.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from dfmspec.diagnostics import COMMAND_LINE, Diagnostic, Edit, Path, Severity, Span, dotted
from dfmspec.errors import UsageError
from dfmspec.read.document import Document, parse_document, read_document, read_scalar
from dfmspec.read.structure import leaves, structural_findings
from dfmspec.spec.catalogue import Catalogue, types
from dfmspec.spec.iterations import split_iteration
from dfmspec.spec.paths import PATH_KEYS, SPEC_DIR, is_relative
from dfmspec.spec.recipes import recipe_text
from dfmspec.targets import DEFAULT_TARGET, TARGETS, catalogue, recipes_of

ALIASES = (("checkpoint_dir", "save"), ("load_checkpoint", "load"))
"""The how-to's names for keys of the checkpoint section."""


def unaliased(key: str) -> str:
    """`checkpoint.save` for the how-to's `checkpoint.checkpoint_dir`; any other key as it is."""
    return next((f"checkpoint.{meant}" for alias, meant in ALIASES if key == f"checkpoint.{alias}"), key)


_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_QUOTED = re.compile(r"""(['"])((?:\\.|(?!\1)[^\\])*)\1""", re.DOTALL)
_OVERRIDE_HINTS = {
    "~": "deleting a key (~) does nothing upstream; set it to the value that is meant",
    "+": "adding keys (+) makes upstream drop unknown ones in silence; leave the + out",
    "-": "flags go before the overrides; see dfmspec validate --help",
}


class Origin(NamedTuple):
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


class Spec(NamedTuple):
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
    documents: tuple[Document, ...] = ()
    users: tuple[str, ...] = ()
    """The keys that a person set."""
    folder: str = "."
    """Of the spec, absolute."""
    under: Mapping[str, tuple[tuple[Any, Origin], ...]] = {}
    """Of a key that several layers set, the values that lie under the last one's, lowest first."""


def load_spec(
    file: str | FilePath | None,
    overrides: Sequence[str] = (),
    *,
    dataset_path: str | None = None,
    environment: Mapping[str, Any] | None = None,
    base: str | None = None,
    spec_dir: str | None = None,
    text: str | None = None,
) -> Spec:
    """Read a spec and everything it builds on.

    Args:
        file: the spec; None: defaults and overrides alone.
        overrides: `key=value`, as on the command line.
        dataset_path: the how-to's --dataset-path.
        base: the folder to which relative paths in files are relative, instead of each file's own.
        spec_dir: what ${SPEC_DIR} stands for in a plan's configuration, instead of the file's own folder.
        text: instead of what the file holds.
        environment: values that the launcher's environment fixes, such as the world size under torchrun.

    Raises:
        OSError: the spec itself cannot be read.
        UsageError: an override names a file to build on.
    """
    loader = _Loader(base, spec_dir)
    own = Document("<defaults>", "", data={}) if file is None else read_document(file) if text is None else parse_document(text.encode(), str(file))
    loader.lay_files(own)
    if dataset_path is not None:
        loader.lay("flag", {"dataset": {"path": dataset_path}}, Document("--dataset-path", ""))
    for line, override in enumerate(overrides, 1):
        loader.lay_override(override, line)
    for key, value in (environment or {}).items():
        loader.fixed[key] = value
    stem = FilePath(file).stem if file is not None else "dit_butterfly"
    if overrides:
        loader.documents.append(Document(COMMAND_LINE, "\n".join(overrides)))
    return loader.finish(own.file, stem, tuple(overrides))


class _Layer(NamedTuple):
    """One layer, normalised, with the document that it came from."""

    kind: str
    data: dict[str, Any]
    document: Document


class _Loader:
    """Collects layers; `finish` lays them on one another."""

    def __init__(self, base: str | None, spec_dir: str | None) -> None:
        self.base, self.spec_dir = base, spec_dir
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
        self.lay(kind, data, document)

    def _lay_reference(self, document: Document, key: str, name: str, ancestors: tuple[str, ...]) -> None:
        path = FilePath(document.file).parent / name
        span = document.values.get((key,), document.span((key,)))
        try:
            if os.path.realpath(path) in ancestors:
                self._problem(span, "SPC105", "circular-extends", f"{name} is laid under itself", "remove one of the two references", (key,))
                return
            base = read_document(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            message = f"{key}: {path} cannot be read: {getattr(error, 'strerror', None) or error}"
            self._problem(span, "SPC104", "unreadable-base", message, "paths in a spec are relative to that spec", (key,))
            return
        self._lay_document(base, "extends" if key == "extends" else "config file", ancestors)

    def lay_override(self, text: str, line: int) -> None:
        """One `key=value` of the command line, which is shown as the given line of a file with one override a line."""
        key, equals, value = text.partition("=")
        whole = Span(COMMAND_LINE, line, 1, line, len(text) + 1)
        if not equals or not _KEY.fullmatch(key):
            what = f"begins with {key[:1]}" if key[:1] in _OVERRIDE_HINTS else "is not key=value"
            hint = _OVERRIDE_HINTS.get(key[:1], "write key=value, such as model.tensor_model_parallel_size=2")
            self._problem(whole, "SPC107", "malformed-override", f"{text!r} {what}", hint, ())
            return
        if key in ("extends", "config_file"):
            raise UsageError(f"{key} belongs in a spec; on the command line give the spec that has it")
        node: Any = _OverrideText(value) if (text_itself := _unquoted(value)) is None else text_itself
        for part in reversed(key.split(".")):
            node = {part: node}
        path = tuple(key.split("."))
        value_span = Span(COMMAND_LINE, line, len(key) + 2, line, len(text) + 1)
        keys: dict[Path, Span] = {path[:depth]: whole for depth in range(1, len(path) + 1)}
        self.lay("override", node, Document(COMMAND_LINE, text, keys=keys, values={path: value_span}))

    def lay(self, kind: str, data: dict[str, Any], document: Document) -> None:
        """Add a layer."""
        self.layers.append(_Layer(kind, data, document))

    def _problem(
        self, span: Span, code: str, name: str, message: str, hint: str, path: Path, severity: Severity = Severity.ERROR, fix: tuple[Edit, ...] = ()
    ) -> None:
        self.problems.append(Diagnostic(span, code, name, severity, message, hint, path, fix=fix))

    def finish(self, file: str, stem: str, overrides: tuple[str, ...]) -> Spec:
        target = self._choice("target", tuple(TARGETS), DEFAULT_TARGET)
        recipe = self._choice("recipe", recipes_of(target), TARGETS[target].default_recipe)
        legal = catalogue(target)
        start, places = _defaults(target, recipe)
        values, origins = dict(start), dict(places)
        broken: set[str] = set()
        under: dict[str, tuple[tuple[Any, Origin], ...]] = {}
        for layer in self.layers:
            for key, value, path in self._checked(layer, legal, target, broken):
                if origins[key].layer != "default":
                    under[key] = (*under.get(key, ()), (values[key], origins[key]))
                values[key] = self._located(key, value, layer)
                origins[key] = Origin(layer.kind, _place(path, layer.document))
                broken.discard(key)
        for key, value in self.fixed.items():
            values[key], origins[key] = value, Origin("environment", Span("<environment>"))
        name = values["name"] or re.sub(r"^[^A-Za-z0-9_]+|[^A-Za-z0-9_.-]", "-", stem).lstrip("-.") or "experiment"
        users = tuple(key for key, origin in origins.items() if origin is not places.get(key))
        return Spec(
            file, name, target, values, origins, tuple(self.problems), frozenset(broken), overrides, tuple(self.documents), users,
            os.path.realpath(FilePath(file).parent), under,
        )  # fmt: skip

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
        folder = os.path.realpath(FilePath(layer.document.file).parent)
        if value.startswith(SPEC_DIR):
            return os.path.relpath((self.spec_dir or folder) + value.removeprefix(SPEC_DIR))
        return os.path.relpath(os.path.join(self.base or folder, value)) if is_relative(value) else value

    def _checked(self, layer: _Layer, legal: Catalogue, target: str, broken: set[str]) -> Iterator[tuple[str, Any, Path]]:
        """The layer's legal entries; what is not legal is reported."""
        data = _typed_overrides(_sections(self._aliased(layer), legal), legal)
        for problem in structural_findings(data, layer.document, legal, target):
            self.problems.append(problem)
            if problem.path:
                broken.add(dotted(problem.path[:2]))
        for key, value, path in leaves(data, legal):
            if legal.field(key) is not None and key not in broken and not legal.is_section(key):
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
            if key in section:
                message = f"checkpoint.{alias} and checkpoint.{key} are two names of one key"
                self._problem(_place(("checkpoint", key), layer.document), "SPC102", "duplicate-key", message, "keep one of the two", ("checkpoint", key))
            text = value.text if isinstance(value, _OverrideText) else value
            edits = [Edit("rename", ("checkpoint", alias), key)]
            if isinstance(text, str) and alias == "load_checkpoint":
                text, step = split_iteration(text)
                if step is not None:
                    edits += [Edit("set", ("checkpoint", alias), text)]
                    edits += [] if "ckpt_step" in section else [Edit("insert", ("checkpoint", alias), ("ckpt_step", step))]
                    section["ckpt_step"] = step
            span = layer.document.span(("checkpoint", alias)) if layer.document.text else Span(layer.document.file)
            self._problem(
                span, "CKP101", "documented-alias", f"checkpoint.{alias} is the how-to's name for checkpoint.{key}",
                f"write checkpoint.{key}; it is taken as that", ("checkpoint", alias), Severity.HINT, () if key in section else tuple(edits),
            )  # fmt: skip
            section.setdefault(key, text)
        return {**layer.data, "checkpoint": section}


@lru_cache
def _defaults(target: str, recipe: str) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The values and origins under every layer of a person's: the target's defaults, then the recipe's own."""
    legal = catalogue(target)
    values, nobody = dict(legal.defaults()), Origin("default", Span("<defaults>"))
    origins = dict.fromkeys(values, nobody)
    document = parse_document(recipe_text(recipe), f"recipe {recipe}")
    for key, value, path in leaves(document.data, legal):
        if legal.field(key) is not None:  # a recipe may have keys that this target does not
            values[key], origins[key] = value, Origin(f"recipe {recipe}", document.span(path))
    return values, origins


def recipe_value(target: str, recipe: str, key: str) -> Any:
    """What a key has when nobody sets it; None where it is derived."""
    return _defaults(target, recipe)[0][key]


def _place(path: Path, document: Document) -> Span:
    """Where a layer sets a key: under its own name, or under the how-to's."""
    if not document.text:
        return Span(document.file)
    alias = next((("checkpoint", alias) for alias, key in ALIASES if path == ("checkpoint", key)), path)
    return document.span(path if path in document.keys or alias not in document.keys else alias)


def _sections(data: dict[str, Any], legal: Catalogue) -> dict[str, Any]:
    """With `mixed_precision: NAME` as its recipe field, and without optional sections that are null."""
    out = {}
    for name, node in data.items():
        text = node.text if isinstance(node, _OverrideText) else node
        text = None if text in ("null", "~", "") else text
        declared = types(legal.field(name) or {}) if legal.is_section(name) else ()
        if "string" in declared and (text is None or isinstance(text, str)):
            out[name] = {"recipe": text.replace("-", "_") if text else text}
        elif not ("null" in declared and text is None):
            out[name] = node
    return out


def _unquoted(value: str) -> str | None:
    """What Hydra reads in quotes, which is always text; None when the value has none."""
    match = _QUOTED.fullmatch(value)
    return None if match is None else match[2].replace(f"\\{match[1]}", match[1])


class _OverrideText(NamedTuple):
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
        document = parse_document(f"value: {text}".encode(errors="surrogateescape"), COMMAND_LINE)
        return text if document.problems else document.data["value"]
    return read_scalar(text)


def _canonical(value: Any, field: dict[str, Any]) -> Any:
    """A number field's integer as a float."""
    if isinstance(value, int) and not isinstance(value, bool) and "number" in types(field):
        return float(value)
    return value
