"""YAML text as data, with the place of every key and value.

Scalars follow YAML 1.2's core schema: `1e-4` is a float, `on` a string, `010` is ten. A scalar that YAML 1.1 (PyYAML,
and OmegaConf in part) reads otherwise is reported, as are duplicate keys; nothing is ever the last of two in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from dfmspec.diagnostics import Diagnostic, Path, Severity, Span, dotted

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH = 40

_YAML_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_YAML_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge")}
_NULL = re.compile(r"(?:null|Null|NULL|~|)$")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?[0-9]+$")
_OCTAL_HEX = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")
_OTHER_IN_1_1 = re.compile(
    r"(?:y|Y|yes|Yes|YES|n|N|no|No|NO|on|On|ON|off|Off|OFF)$"  # booleans there
    r"|[-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$"  # base 60
    r"|[-+]?0[0-7]+$|[-+]?0b[01_]+$|0o[0-7]+$"  # octal, binary
    r"|[-+]?[0-9][0-9,]*_[0-9_]*(?:\.[0-9_]*)?$"  # digits with underscores
)


@dataclass(frozen=True)
class Document:
    """A parsed file: plain data, and the span of each path."""

    file: str
    text: str
    data: Any = None
    keys: dict[Path, Span] = field(default_factory=dict)
    """Where the key of a path stands."""
    values: dict[Path, Span] = field(default_factory=dict)
    """Where the value of a path stands."""
    problems: tuple[Diagnostic, ...] = ()

    def span(self, path: Path) -> Span:
        """The place of a path's key; of its nearest parent that is in the file, otherwise."""
        while path:
            if (found := self.keys.get(path)) or (found := self.values.get(path)):
                return found
            path = path[:-1]
        return Span(self.file, 1, 1, 1, 1) if self.text else Span(self.file)


def read_document(file: FilePath | str, *, name: str | None = None) -> Document:
    """Parse a file; whatever is in it, the result is a Document, with its problems.

    Raises:
        OSError: the file cannot be read.
    """
    path = FilePath(file)
    return parse_document(path.read_bytes(), name or str(file))


def parse_document(raw: bytes, name: str) -> Document:
    """Parse the bytes of a YAML file."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _broken(name, "", f"not a text file: byte {error.start} is not UTF-8", "a spec is YAML text in UTF-8")
    if "\0" in text:
        return _broken(name, "", "not a text file: it contains NUL bytes", "a spec is YAML text in UTF-8")
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Span(name, mark.line + 1, mark.column + 1, mark.line + 1, mark.column + 2) if mark else Span(name, 1, 1, 1, 1)
        hint = "indent with spaces" if "\\t" in str(error.problem) else "the text before this place may miss a quote, a bracket or a colon"
        if re.search(r"^(<{7}|={7}|>{7})", text, re.MULTILINE):
            hint = "the file has merge-conflict markers"
        return Document(name, text, problems=(_syntax(place, str(error.problem or error.context), hint),))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return _broken(name, text, first, "remove what is not printable text")
    if node is None:
        return _broken(name, text, "the file is empty", "the smallest spec is: dataset: {path: data/my_webdataset}")
    builder = _Builder(name)
    data = builder.build(node, ())
    if not isinstance(node, yaml.MappingNode):
        builder.problems.append(
            _syntax(_span(name, node), f"a spec is a mapping of sections, not a {_kind(node)}", "start with: model: {...}")
        )
        data = None
    return Document(name, text, data, builder.keys, builder.values, tuple(builder.problems))


def _broken(name: str, text: str, message: str, hint: str) -> Document:
    return Document(name, text, problems=(_syntax(Span(name, 1, 1, 1, 1), message, hint),))


def _syntax(span: Span, message: str, hint: str) -> Diagnostic:
    return Diagnostic(span, "SPC101", "malformed-yaml", Severity.ERROR, message, hint)


def _kind(node: yaml.Node) -> str:
    return str(getattr(node, "id", "node"))


def _span(name: str, node: yaml.Node) -> Span:
    start, end = node.start_mark, node.end_mark
    return Span(name, start.line + 1, start.column + 1, end.line + 1, end.column + 1)


class _Builder:
    """Turns YAML nodes into data, and writes down where everything is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.keys: dict[Path, Span] = {}
        self.values: dict[Path, Span] = {}
        self.problems: list[Diagnostic] = []
        self._open: set[int] = set()

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.values[path] = _span(self.name, node)
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_YAML_TAG, "!!")
            self.problems.append(_syntax(_span(self.name, node), f"YAML tags ({tag}) are not part of a spec", "remove the tag"))
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open or len(path) > _MAX_DEPTH:  # an alias to its own parent, or a tower of brackets
            self.problems.append(_syntax(_span(self.name, node), "the nesting has no end or is deeper than 40", "flatten it"))
            return None
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return dict(self._pairs(node, path))
        finally:
            self._open.discard(id(node))

    def _pairs(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, Any]]:
        first: dict[str, Span] = {}
        for key_node, value_node in node.value:
            place = _span(self.name, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(_syntax(place, f"a key must be a word, not a {_kind(key_node)}", "quote it if it is meant"))
                continue
            key = key_node.value
            if key == "<<" and not key_node.style:
                self.problems.append(_syntax(place, "YAML merge keys (<<) are not part of a spec", "use extends: or repeat the keys"))
                continue
            if key in first:
                message = f"{dotted((*path, key))} is set twice; the first is at line {first[key].line}"
                self.problems.append(
                    Diagnostic(place, "SPC102", "duplicate-key", Severity.ERROR, message, "keep one of the two", (*path, key))
                )
                continue
            first[key] = place
            self.keys[(*path, key)] = place
            yield key, self.build(value_node, (*path, key))

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = node.value
        if node.style:  # quoted or block: a string, whatever it looks like
            return text
        value = read_scalar(text)
        if _OTHER_IN_1_1.match(text):
            shown = f'the string "{value}"' if isinstance(value, str) else repr(value)
            self.problems.append(
                Diagnostic(
                    _span(self.name, node), "SPC103", "ambiguous-scalar", Severity.WARNING,
                    f"{text} is {shown} in YAML 1.2 and something else in YAML 1.1 readers",
                    "quote it if it is text, or write true, false or a plain number",
                    path,
                )
            )
        return value


def read_scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text[0] in "tT"
    if _INT.match(text):
        return int(text) if len(text) < 400 else text
    if _OCTAL_HEX.match(text):
        return int(text, 0) if len(text) < 400 else text
    if _FLOAT.match(text) or _SPECIAL.match(text):
        return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan"))
    return text
