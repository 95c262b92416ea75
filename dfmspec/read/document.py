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

from dfmspec.bounded import SPEC_BYTES, TooLarge, TooMuch, read_bytes, read_stream, refuse_excess
from dfmspec.diagnostics import Diagnostic, Path, Severity, Span, dotted

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 40
"""How deep a spec nests."""
MAX_VALUES = 100_000
"""How many values a spec has, with all that it builds on; an alias or a merge key counts as what it stands for."""
_LETTERS_A_VALUE = 64
"""A longer text counts as several values, each of so many letters: an alias may repeat it."""
_MAX_SEARCHES = 100
"""How many unknown words of a spec are compared with those that are known."""
_WHAT_FITS = (
    f"a spec and the files it builds on have {MAX_VALUES} values in {MAX_DEPTH} levels at most; remove the others"
)

_YAML_TAG = "tag:yaml.org,2002:"
_STRING = _YAML_TAG + "str"
_PLAIN_TAGS = frozenset(
    {
        _YAML_TAG + "map",
        _YAML_TAG + "seq",
        _STRING,
        _YAML_TAG + "int",
        _YAML_TAG + "float",
        _YAML_TAG + "bool",
        _YAML_TAG + "null",
        _YAML_TAG + "timestamp",
        _YAML_TAG + "value",
        _YAML_TAG + "merge",
    }
)
"""Tags that PyYAML resolves plain scalars to by itself; any other one was written."""

# YAML 1.2's core schema, which says what a plain scalar is.
_NULLS = ("", "~", "null", "Null", "NULL")
_WORDS = {
    **dict.fromkeys(_NULLS),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INFINITE = {
    **dict.fromkeys((".inf", ".Inf", ".INF"), float("inf")),
    **dict.fromkeys(("+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_DIGITS = frozenset("0123456789")
_NUMERIC = _DIGITS | frozenset("+-.eE")
_STARTS_A_NUMBER = _DIGITS | frozenset("+-.")
_LONGEST_NUMBER = 400

# What YAML 1.1 takes for a boolean or a number, and YAML 1.2 for a string or another number.
_WORDS_OF_1_1 = frozenset(
    ["y", "Y", "yes", "Yes", "YES", "n", "N", "no", "No", "NO", "on", "On", "ON", "off", "Off", "OFF"]
)
_NUMBERS_OF_1_1 = (
    r"[-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$"  # base 60
    r"|[-+]?0[0-7]+$|[-+]?0b[01_]+$|0o[0-7]+$"  # octal, binary
    r"|[-+]?[0-9][0-9,]*_[0-9_]*(?:\.[0-9_]*)?$"  # digits with underscores
)

_PAIR = r"(?i)\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}"
"""A character beyond 16 bits as JSON escapes it."""

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
            found = self.keys.get(path) or self.values.get(path)
            if found:
                return found
            path = path[:-1]
        if not self.text:
            return Span(self.file)
        return _start_of(self.file)


class Budget:
    """How much may be read: of one document, or of all layers of a spec, which then share it."""

    def __init__(self) -> None:
        self.bytes = 0
        """Read so far."""
        self.values = 0
        """Visited so far, each as often as it was."""
        self.searches = 0
        """For a near spelling of an unknown word, so far."""

    def count(self, node: yaml.Node) -> bool:
        """Visit a node; whether there is room for it."""
        self.values += 1
        if isinstance(node, yaml.ScalarNode):
            self.values += len(node.value) // _LETTERS_A_VALUE
        return self.values <= MAX_VALUES

    def may_search(self) -> bool:
        """Whether a near spelling is looked for once more, which takes milliseconds."""
        self.searches += 1
        return self.searches <= _MAX_SEARCHES


def read_document(
    file: FilePath | str,
    budget: Budget | None = None,
    *,
    may_be_a_pipe: bool = False,
) -> Document:
    """Parse a file, or - for stdin; whatever is in it, the result is a Document, with its problems.

    Args:
        file: its path.
        budget: what is left to the document; None: what a whole spec may take.
        may_be_a_pipe: a pipe is read as well as a regular file.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    budget = budget or Budget()
    is_stdin = str(file) == "-"
    name = "<stdin>" if is_stdin else str(file)
    most = SPEC_BYTES - budget.bytes
    try:
        if is_stdin:
            raw = read_stream(sys.stdin.buffer, name, most=most)
        else:
            raw = read_bytes(file, most=most, may_be_a_pipe=may_be_a_pipe)
    except TooLarge:
        message = f"a spec and the files it builds on have at most {SPEC_BYTES} bytes, and this file brings more"
        return _broken(name, "", message, _WHAT_FITS)
    budget.bytes += len(raw)
    return parse_document(raw, name, budget)


def parse_document(raw: bytes, name: str, budget: Budget | None = None) -> Document:
    """Parse the bytes of a YAML file, which messages call by the name.

    Args:
        raw: the bytes.
        name: what messages call it.
        budget: what is left to it; None: what a whole spec may take.
    """
    budget = budget or Budget()

    # Bytes to text.
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"not a text file: byte {error.start} is not UTF-8"
        return _broken(name, "", message, "a spec is YAML text in UTF-8")
    if "\0" in text:
        return _broken(name, "", "not a text file: it contains NUL bytes", "a spec is YAML text in UTF-8")

    # Text to nodes.
    try:
        loader = _loader_of(text)
        refuse_excess(text, loader, values=MAX_VALUES - budget.values, depth=MAX_DEPTH)
        node = yaml.compose(text, Loader=loader)
    except TooMuch as error:
        place = Span(name, error.line, error.column, error.line, error.column + 1)
        return _broken(name, text, str(error), _WHAT_FITS, place)
    except yaml.MarkedYAMLError as error:
        return Document(name, text, problems=(_syntax_error(name, text, error),))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        lines = str(error).splitlines()
        message = lines[0] if lines else type(error).__name__
        return _broken(name, text, message, "remove what is not printable text")

    # Nodes to data.
    if node is None or _is_null(node):  # nothing, or comments alone
        return Document(name, text, {})
    builder = _Builder(name, budget)
    try:
        data = builder.build(node, ())
    except _NoRoom as error:
        return _broken(name, text, str(error), _WHAT_FITS, _span(name, error.node))
    if not isinstance(node, yaml.MappingNode):
        message = f"a spec is a mapping of sections, not a {_kind(node)}"
        builder.report(node, message, "start with: model: {...}")
        data = None
    return Document(
        file=name,
        text=text,
        data=data,
        keys=builder.keys,
        values=builder.values,
        problems=tuple(builder.problems),
    )


class _FastLoader(_LOADER):  # type: ignore[misc]  # one of two classes
    """Leaves it to us what a plain scalar is; a tag that is written stays."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        """The tag of a node that has none: any of those that PyYAML would give counts alike."""
        return _STRING


class _JsonLoader(yaml.SafeLoader):
    """Reads what JSON's writers make of a character beyond 16 bits: two escapes, which the C loader refuses."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        """A scalar in which each pair of surrogates is the one character that it stands for."""
        node = super().compose_scalar_node(anchor)
        try:
            node.value = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            problem = "found half of a pair of Unicode character escape codes"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
        return node


def _loader_of(text: str) -> Any:
    """The loader of a text: the fast one, unless it has pairs of escapes."""
    return _JsonLoader if re.search(_PAIR, text) else _FastLoader


def _is_null(node: yaml.Node) -> bool:
    """Whether a node is a null, which in quotes is a string."""
    if not isinstance(node, yaml.ScalarNode):
        return False
    return not node.style and node.value in _NULLS


def _syntax_error(name: str, text: str, error: yaml.MarkedYAMLError) -> Diagnostic:
    """What the parser stops at, with the mistake that is most often behind it."""
    # The place; PyYAML counts lines and columns from 0.
    mark = error.problem_mark or error.context_mark
    place = _start_of(name)
    if mark:
        line = mark.line + 1
        column = mark.column + 1
        place = Span(name, line, column, line, column + 1)

    # The mistake, in a user's words. A marker of a merge is no YAML, whatever the parser calls it.
    said = str(error.problem or error.context)
    lines = lines_of(text)
    written = lines[place.line - 1] if 0 < place.line <= len(lines) else ""
    indent = written[: len(written) - len(written.lstrip())]
    if re.search(r"^(<{7}|={7}|>{7})", text, re.MULTILINE):
        hint = "the file has merge-conflict markers"
    elif "\t" in (*indent, written[place.column - 1 : place.column]):
        said = "a tab, which YAML does not take for indentation"
        hint = "indent with spaces"
    elif "Unicode character escape" in str(error.problem):
        hint = "write the character itself, or its number in eight digits, such as \\U0001F98B"
    else:
        hint = "the text before this place may miss a quote, a bracket or a colon, or be indented differently"
    for theirs, ours in _IN_OUR_WORDS.items():
        said = said.replace(theirs, ours)
    return _malformed(place, said, hint)


_IN_OUR_WORDS = {
    "mapping values are not allowed in this context": "a colon where no key can be: a value with a colon needs quotes",
    "did not find expected key": "no key here, where one has to be",
    "did not find expected '-' indicator": "no - here, where the list has to go on or be indented less",
    "did not find expected ',' or '}'": "no comma or } here, where the braces have to go on or end",
    "did not find expected ',' or ']'": "no comma or ] here, where the brackets have to go on or end",
    "found unexpected end of stream": "the file ends inside quotes",
    "found character that cannot start any token": "a character that nothing can begin with outside quotes",
    "could not find expected ':'": "a line that is neither a key with a colon nor the rest of a value",
    "while scanning a simple key": "this line is no key",
    "found undefined alias": "an alias (*) that no anchor (&) has been given",
    "block sequence entries are not allowed in this context": "a - where no list can begin",
}
"""What the parser says, and what it means for who wrote the file."""


def _broken(name: str, text: str, message: str, hint: str, place: Span | None = None) -> Document:
    """A document of which nothing could be read."""
    problem = _malformed(place or _start_of(name), message, hint)
    return Document(name, text, problems=(problem,))


def _malformed(span: Span, message: str, hint: str) -> Diagnostic:
    """A text that is no YAML, or no YAML that a spec can have."""
    return Diagnostic(
        span,
        "SPC101",
        "malformed-yaml",
        Severity.ERROR,
        message,
        hint,
    )


def _kind(node: yaml.Node) -> str:
    """What a message calls a node: scalar, sequence or mapping."""
    return str(getattr(node, "id", "node"))


def _start_of(name: str) -> Span:
    """The first character of a file."""
    return Span(name, 1, 1, 1, 1)


def _span(name: str, node: yaml.Node) -> Span:
    """A node's place, in lines and columns from 1; PyYAML counts from 0."""
    start = node.start_mark
    end = node.end_mark
    return Span(
        file=name,
        line=start.line + 1,
        column=start.column + 1,
        end_line=end.line + 1,
        end_column=end.column + 1,
    )


class _NoRoom(Exception):
    """A node for which there is no room, and why."""

    def __init__(self, node: yaml.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


class _Builder:
    """Turns YAML nodes into data, and writes down where everything is."""

    def __init__(self, name: str, budget: Budget) -> None:
        self.name = name
        self.budget = budget
        self.keys: dict[Path, Span] = {}
        self.values: dict[Path, Span] = {}
        self.problems: list[Diagnostic] = []
        self._open: set[int] = set()

    def build(self, node: yaml.Node, path: Path) -> Any:
        """The data of a node; None where it cannot be part of a spec, which is reported.

        Raises:
            _NoRoom: there is no room left, or the nesting is too deep.
        """
        # An alias is built anew at every place, so that each has its own path; aliases of aliases grow without end.
        self._visit(node)
        self.values[path] = _span(self.name, node)
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace(_YAML_TAG, "!!")
            self.report(node, f"YAML tags ({tag}) are not part of a spec", "remove the tag")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)

        # An alias may name its own parent.
        if id(node) in self._open or len(path) > MAX_DEPTH:
            raise _NoRoom(node, f"the nesting has no end or is deeper than {MAX_DEPTH}")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                children = enumerate(node.value)
                return [self.build(child, (*path, index)) for index, child in children]
            assert isinstance(node, yaml.MappingNode)
            return dict(self._pairs(node, path, set()))
        finally:
            self._open.discard(id(node))

    def _visit(self, node: yaml.Node) -> None:
        """Count a node, as often as it is looked at.

        Raises:
            _NoRoom: there is no room left.
        """
        if not self.budget.count(node):
            raise _NoRoom(node, f"more than {MAX_VALUES} values, through aliases, merge keys or files under it")

    def report(self, node: yaml.Node, message: str, hint: str) -> None:
        """Write down that a node is not what a spec can have."""
        self.problems.append(_malformed(_span(self.name, node), message, hint))

    def _pairs(
        self,
        node: yaml.MappingNode,
        path: Path,
        taken: set[str],
    ) -> Iterator[tuple[str, Any]]:
        """The entries of a mapping, less the keys that are taken; they are then taken too."""
        # Its own keys. `<<` in quotes is a key like any other.
        own: dict[str, Span] = {}
        bases: list[yaml.Node] = []
        for key_node, value_node in node.value:
            self._visit(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                message = f"a key must be a word, not a {_kind(key_node)}"
                self.report(key_node, message, "quote it if it is meant")
                continue
            key = key_node.value
            if key == "<<" and not key_node.style:
                bases += _bases_of(value_node)
                continue
            place = _span(self.name, key_node)
            key_path = (*path, key)
            if key in own:
                problem = _set_twice(key_path, place, own[key], value_node)
                self.problems.append(problem)
                continue
            own[key] = place
            if key in taken:
                continue
            taken.add(key)
            self.keys[key_path] = place
            yield key, self.build(value_node, key_path)

        # Merge keys: what is set here, or by an earlier base, stays.
        for base in bases:
            self._visit(base)
            # Each merge opens what it merges, on top of the levels of the path.
            if len(self._open) > 2 * MAX_DEPTH:
                raise _NoRoom(base, f"merge keys (<<) are nested deeper than {MAX_DEPTH}")
            is_its_parent = id(base) in self._open
            if not isinstance(base, yaml.MappingNode) or is_its_parent:
                message = "a merge key (<<) takes a mapping"
                self.report(base, message, "name an anchor, such as <<: *base")
            else:
                self._open.add(id(base))
                yield from self._pairs(base, path, taken)
                self._open.discard(id(base))

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        """A scalar's value; one that YAML 1.1 reads otherwise is reported."""
        text = node.value
        if node.style:  # quoted or block: a string, whatever it looks like
            return text
        value = read_scalar(text)
        # Upstream reads with OmegaConf, which follows YAML 1.1 in part: the file could mean two things.
        if _differs_in_1_1(text):
            place = _span(self.name, node)
            self.problems.append(_ambiguous(place, text, value, path))
        return value


def _bases_of(node: yaml.Node) -> list[yaml.Node]:
    """The mappings that a merge key names: one, or a list of them."""
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    return [node]


def _set_twice(path: Path, place: Span, first: Span, value: yaml.Node) -> Diagnostic:
    """A key that a mapping has twice; the value is that of the second."""
    hint = "keep one of the two"
    if isinstance(value, yaml.MappingNode):
        hint = "merge the two"
    return Diagnostic(
        place,
        "SPC102",
        "duplicate-key",
        Severity.ERROR,
        f"{dotted(path)} is set twice; the first is at line {first.line}",
        hint,
        path,
    )


def _ambiguous(place: Span, text: str, value: Any, path: Path) -> Diagnostic:
    """A plain scalar that YAML 1.1 and 1.2 read differently; the value is that of 1.2."""
    meaning = repr(value)
    if isinstance(value, str):
        meaning = f'the string "{value}"'
    return Diagnostic(
        place,
        "SPC103",
        "ambiguous-scalar",
        Severity.WARNING,
        f"{text} is {meaning} in YAML 1.2, and {_in_yaml_1_1(text)} to YAML 1.1, by which others read",
        "quote it if it is text, or write true, false or a plain number",
        path,
    )


def _in_yaml_1_1(text: str) -> str:
    """What YAML 1.1 makes of a plain scalar, for a message."""
    value = yaml.safe_load(text)
    return json.dumps(value, default=str) if not isinstance(value, str) else f'the string "{value}"'


def read_scalar(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _STARTS_A_NUMBER or len(text) >= _LONGEST_NUMBER:
        return text
    if text in _INFINITE:
        return _INFINITE[text]
    if text.isascii() and _NUMERIC.issuperset(text):
        return _decimal(text)
    # int() takes underscores, which the core schema does not.
    if text[:2] in ("0o", "0x") and "_" not in text:
        try:
            return int(text, 0)
        except ValueError:
            return text
    return text


def _decimal(text: str) -> int | float | str:
    """A number, or the text where signs, points and digits make none."""
    try:
        if _DIGITS.issuperset(text.lstrip("+-")):
            return int(text)
        return float(text)
    except ValueError:
        return text


def _differs_in_1_1(text: str) -> bool:
    """Whether a YAML 1.1 reader takes a plain scalar for something else."""
    if text[:1] not in _STARTS_A_NUMBER:
        return text in _WORDS_OF_1_1
    # Most numbers have digits alone, and no 0 first: no need to look closer.
    if _DIGITS.issuperset(text) and text[0] != "0":
        return False
    return re.match(_NUMBERS_OF_1_1, text) is not None


def write_scalar(value: Any) -> str:
    """A value as JSON that YAML 1.1 and 1.2 read alike: PyYAML, ruamel and OmegaConf."""
    # JSON cuts a character beyond 16 bits into two escapes, which YAML reads as two characters.
    text = re.sub(_PAIR, _one_escape, json.dumps(value))
    # To YAML 1.1, 1e-07 is a string: its floats have a point.
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


def _one_escape(pair: re.Match[str]) -> str:
    """A surrogate pair of JSON as YAML's one escape."""
    character = json.loads('"' + pair[0] + '"')
    return f"\\U{ord(character):08X}"


def lines_of(text: str) -> list[str]:
    """The lines of a text as YAML counts them, each with its end."""
    pieces = re.findall("[^\n\r\x85\u2028\u2029]*(?:\r\n|[\n\r\x85\u2028\u2029]|$)", text)
    return [line for line in pieces if line]
