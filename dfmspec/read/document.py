"""YAML text as data, with the place of every key and value.

Scalars follow YAML 1.2's core schema: `1e-4` is a float, `on` a string, `010` is ten. A scalar that YAML 1.1 (PyYAML,
and OmegaConf in part) reads otherwise is reported, as are duplicate keys; nothing is ever the last of two in silence.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import yaml

from dfmspec.diagnostics import Diagnostic, Path, Severity, Span, dotted

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MAX_DEPTH = 40
_MAX_NODES = 100_000

_YAML_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_YAML_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge")}
_NULLS = ("", "~", "null", "Null", "NULL")
_WORDS = {**dict.fromkeys(_NULLS), **dict.fromkeys(("true", "True", "TRUE"), True), **dict.fromkeys(("false", "False", "FALSE"), False)}
_INFINITE = {sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}
_INFINITE |= dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan"))
_DIGITS = frozenset("0123456789")
_NUMERIC = _DIGITS | frozenset("+-.eE")
_STARTS_A_NUMBER = _DIGITS | frozenset("+-.")
_WORDS_OF_1_1 = frozenset(["y", "Y", "yes", "Yes", "YES", "n", "N", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF"])
_NUMBERS_OF_1_1 = (
    r"[-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$"  # base 60
    r"|[-+]?0[0-7]+$|[-+]?0b[01_]+$|0o[0-7]+$"  # octal, binary
    r"|[-+]?[0-9][0-9,]*_[0-9_]*(?:\.[0-9_]*)?$"  # digits with underscores
)


_NOWHERE: Mapping[Path, Span] = {}


class Document(NamedTuple):
    """A parsed file: plain data, and the span of each path."""

    file: str
    text: str
    data: Any = None
    keys: Mapping[Path, Span] = _NOWHERE
    """Where the key of a path stands."""
    values: Mapping[Path, Span] = _NOWHERE
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
    """Parse a file, or - for stdin; whatever is in it, the result is a Document, with its problems.

    Raises:
        OSError: the file cannot be read.
    """
    if str(file) == "-":
        return parse_document(sys.stdin.buffer.read(), "<stdin>")
    return parse_document(FilePath(file).read_bytes(), name or str(file))


def parse_document(raw: bytes, name: str) -> Document:
    """Parse the bytes of a YAML file."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _broken(name, "", f"not a text file: byte {error.start} is not UTF-8", "a spec is YAML text in UTF-8")
    if "\0" in text:
        return _broken(name, "", "not a text file: it contains NUL bytes", "a spec is YAML text in UTF-8")
    try:
        if len(text) > _MAX_DEPTH and _depth(text) > _MAX_DEPTH:
            return _broken(name, text, f"the nesting is deeper than {_MAX_DEPTH}", "flatten it")
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Span(name, mark.line + 1, mark.column + 1, mark.line + 1, mark.column + 2) if mark else Span(name, 1, 1, 1, 1)
        missing = "the text before this place may miss a quote, a bracket or a colon, or be indented differently"
        hint = "indent with spaces" if "\\t" in str(error.problem) else missing
        if re.search(r"^(<{7}|={7}|>{7})", text, re.MULTILINE):
            hint = "the file has merge-conflict markers"
        return Document(name, text, problems=(_syntax(place, str(error.problem or error.context), hint),))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return _broken(name, text, first, "remove what is not printable text")
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULLS):  # nothing, or comments alone
        return Document(name, text, {})
    builder = _Builder(name)
    data = builder.build(node, ())
    if not isinstance(node, yaml.MappingNode):
        builder.problems.append(
            _syntax(_span(name, node), f"a spec is a mapping of sections, not a {_kind(node)}", "start with: model: {...}")
        )
        data = None
    return Document(name, text, data, builder.keys, builder.values, tuple(builder.problems))


def _depth(text: str) -> int:
    """How deep a text nests, without building it: the composer's recursion has no bound of its own."""
    if text.count("[") + text.count("{") + text.count("- ") + text.count("?") + text.count(": ") < 2000 and not re.search(rf"(?m)^ {{{_MAX_DEPTH},}}", text):
        return 0  # not enough in it to harm anybody; `build` counts
    depth = deepest = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        deepest = max(deepest, depth)
        if deepest > _MAX_DEPTH:
            break
    return deepest


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
        self._built = 0

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.values[path] = _span(self.name, node)
        self._built += 1
        if self._built > _MAX_NODES:  # aliases of aliases grow without end
            if self._built == _MAX_NODES + 1:
                self.problems.append(_syntax(_span(self.name, node), f"more than {_MAX_NODES} values, through aliases", "flatten it"))
            return None
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

    def _pairs(self, node: yaml.MappingNode, path: Path, taken: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
        """The entries of a mapping, less the keys that are taken."""
        first: dict[str, Span] = {}
        bases: list[yaml.Node] = []
        for key_node, value_node in node.value:
            place = _span(self.name, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(_syntax(place, f"a key must be a word, not a {_kind(key_node)}", "quote it if it is meant"))
                continue
            key = key_node.value
            if key == "<<" and not key_node.style:
                bases += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if key in first:
                message = f"{dotted((*path, key))} is set twice; the first is at line {first[key].line}"
                self.problems.append(
                    Diagnostic(
                        place, "SPC102", "duplicate-key", Severity.ERROR, message,
                        "merge the two" if isinstance(value_node, yaml.MappingNode) else "keep one of the two", (*path, key),
                    )
                )
                continue
            first[key] = place
            if key in taken:
                continue
            self.keys[(*path, key)] = place
            yield key, self.build(value_node, (*path, key))
        taken = taken | first.keys()
        for base in bases:  # merge keys: what is set here, or by an earlier base, stays
            if not isinstance(base, yaml.MappingNode) or id(base) in self._open:
                self.problems.append(_syntax(_span(self.name, base), "a merge key (<<) takes a mapping", "name an anchor, such as <<: *base"))
                continue
            self._open.add(id(base))
            for key, value in self._pairs(base, path, taken):
                taken = taken | {key}
                yield key, value
            self._open.discard(id(base))

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = node.value
        if node.style:  # quoted or block: a string, whatever it looks like
            return text
        value = read_scalar(text)
        if _differs_in_1_1(text):
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
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _STARTS_A_NUMBER or len(text) >= 400:
        return text
    if text in _INFINITE:
        return _INFINITE[text]
    if text.isascii() and _NUMERIC.issuperset(text):
        try:
            return int(text) if _DIGITS.issuperset(text.lstrip("+-")) else float(text)
        except ValueError:
            return text
    if text[:2] in ("0o", "0x"):
        try:
            return int(text, 0) if "_" not in text else text
        except ValueError:
            return text
    return text


def _differs_in_1_1(text: str) -> bool:
    """Whether a YAML 1.1 reader takes a plain scalar for something else."""
    if text[:1] not in _STARTS_A_NUMBER:
        return text in _WORDS_OF_1_1
    plain = _DIGITS.issuperset(text) and text[0] != "0"  # most numbers: no need to look closer
    return not plain and bool(re.match(_NUMBERS_OF_1_1, text))


def write_scalar(value: Any) -> str:
    """A value as JSON that YAML 1.1 and 1.2 read alike: PyYAML, ruamel and OmegaConf."""
    text = re.sub(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}", _one_escape, json.dumps(value))
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")  # YAML 1.1 needs the point
    return text


def _one_escape(pair: re.Match[str]) -> str:
    """A surrogate pair of JSON as YAML's one escape."""
    character = json.loads('"' + pair[0] + '"')
    return f"\\U{ord(character):08X}"


def lines_of(text: str) -> list[str]:
    """The lines of a text as YAML counts them, each with its end."""
    return [line for line in re.findall("[^\n\r\x85\u2028\u2029]*(?:\r\n|[\n\r\x85\u2028\u2029]|$)", text) if line]
