"""Edits of a spec's text, made in place: what is not edited stays as it is, byte for byte, comments and all.

Every edit is proven by reading the result: it must be the old data with that one entry changed, or it is not made.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from dfmspec.diagnostics import Diagnostic, Edit, Span
from dfmspec.read.document import Document, lines_of, parse_document, read_scalar, write_scalar

_PROVEN_VALUES = 50_000
"""How many values are read again, all proofs together."""
_IN_QUOTES = ("y", "n", "yes", "no", "on", "off", "none")
"""Booleans of YAML 1.1; and none, which is too near to null for a reader."""


def fixed(document: Document, findings: Iterable[Diagnostic], *, unsafe: bool = False) -> tuple[str, list[Diagnostic]]:
    """The text of a document after the edits of its findings, and the findings that were mended.

    Edits that are not safe are left out unless unsafe is set; so is a finding of which one edit cannot be made. Each is
    proven by reading the whole text again: of a long one, a few are mended at a time.
    """
    mended = []
    proofs = max(1, _PROVEN_VALUES // (1 + len(document.values)))
    for finding in findings:
        if not proofs:
            break
        if not finding.fix or finding.span.file != document.file or not _stands_there(finding, document):
            continue
        if not unsafe and not all(edit.safe for edit in finding.fix):
            continue
        proofs -= 1
        after = _all_edited(document, finding.fix)
        if after is not None:
            document = after
            mended.append(finding)
    return document.text, mended


def _stands_there(finding: Diagnostic, document: Document) -> bool:
    """Whether a finding is about the entry of its path, and not about a cell of a matrix that sets the same key."""
    path = finding.path
    return finding.span in (document.keys.get(path), document.values.get(path))


def _all_edited(document: Document, edits: Iterable[Edit]) -> Document | None:
    """The document after all edits of a finding; None when one of them cannot be made."""
    # Renames last: the paths of the others have the old name.
    for edit in sorted(edits, key=lambda edit: edit.kind == "rename"):
        changed = _edited(document, edit)
        if changed is None:
            return None
        document = changed
    return document


def _edited(document: Document, edit: Edit) -> Document | None:
    """The document after one edit; None when it cannot be made, or when the result does not say exactly that."""
    key = document.keys.get(edit.path)
    value = document.values.get(edit.path)
    if edit.kind == "move":
        text = _moved(document, edit)
        return None if text is None else _proven(document, edit, text)
    if key is None or value is None:
        return None
    if edit.kind == "rename":
        text = _replaced(document.text, key, edit.value)
    elif edit.kind == "set" and "${" in _taken(document.text, value):
        return None  # what it refers to is to be mended, not the reference
    elif edit.kind == "set":
        text = _replaced(document.text, value, scalar(edit.value))
    else:
        text = _with_entry(document.text, key, value, edit)

    return _proven(document, edit, text)


def _proven(document: Document, edit: Edit, text: str) -> Document | None:
    """The document with another text; None when that does not say exactly what the edit means."""
    after = parse_document(text.encode(), document.file)
    is_as_meant = _same(after.data, _expected(document.data, edit))
    if not is_as_meant or len(after.problems) > len(document.problems):
        return None
    return after


def _with_entry(text: str, key: Span, value: Span, edit: Edit) -> str:
    """A text with a further entry behind the one whose key and value stand at these places."""
    name, content = edit.value
    entry = f"{name}: {scalar(content)}"
    lines = lines_of(text)
    line = lines[key.line - 1]
    indent = line[: key.column - 1]

    # Inside braces, or behind a dash: on the value's own line.
    if indent.strip():
        end = value._replace(line=value.end_line, column=value.end_column)
        return _replaced(text, end, f", {entry}")

    # On a line of its own, with the line ending of its neighbour; the last line of a file may have none.
    ending = line[len(line.rstrip("\r\n")) :] or "\n"
    before = ending
    if lines[value.end_line - 1].endswith(("\n", "\r")):
        before = ""
    lines.insert(value.end_line, f"{before}{indent}{entry}{ending}")
    return "".join(lines)


def _moved(document: Document, edit: Edit) -> str | None:
    """A text with an entry of one section in another; None where the entry shares its line with others."""
    key = document.keys.get(edit.path)
    value = document.values.get(edit.path)
    if key is None or value is None or value.end_line != key.line:
        return None
    lines = lines_of(document.text)
    line = lines[key.line - 1]
    indent = line[: key.column - 1]
    if indent.strip():
        return None

    # The section that it goes to, or a new one in the place of the old; the old one goes with its last entry.
    section, name = edit.value
    there = document.keys.get((section,))
    entry = line[: key.column - 1] + str(name) + line[key.end_column - 1 :]
    entry = entry if entry.endswith(("\n", "\r")) else entry + "\n"
    left = [path for path in document.keys if len(path) == 2 and path[0] == edit.path[0] and path != edit.path]
    old = document.keys[edit.path[:1]]
    if there is None:
        entry = f"{section}:{lines[old.line - 1][old.end_column :]}{entry}" if not left else f"{section}:\n{entry}"
        at = old.line - 1
    else:
        at = there.line
    edited = {key.line - 1, *([] if left else [old.line - 1])}
    kept: list[str] = []
    for number, each in enumerate(lines):
        if number == at:
            kept.append(entry)
        if number not in edited:
            kept.append(each)
    if at >= len(lines):
        kept.append(entry)
    return "".join(kept)


def _taken(text: str, place: Span) -> str:
    """What stands at a place."""
    lines = lines_of(text)[place.line - 1 : place.end_line]
    lines[-1] = lines[-1][: place.end_column - 1]
    return "".join(lines)[place.column - 1 :]


def _replaced(text: str, place: Span, new: str) -> str:
    """A text with something else at a place."""
    lines = lines_of(text)
    first = place.line - 1
    before = "".join(lines[:first]) + lines[first][: place.column - 1]
    # A block may end where the file does, behind the last line.
    last = place.end_line - 1
    after = "".join(lines[last:])[place.end_column - 1 :]
    return before + new + after


def _expected(data: Any, edit: Edit) -> Any:
    """The data as they must be after an edit."""
    out = copy.deepcopy(data)
    node = out
    for part in edit.path[:-1]:
        node = node[part]
    last = edit.path[-1]
    if edit.kind == "move":
        section, name = edit.value
        content = node.pop(last)
        if not node:
            del out[edit.path[0]]
        out.setdefault(section, {})[name] = content
    elif edit.kind == "rename":
        node[edit.value] = node.pop(last)
    elif edit.kind == "set":
        node[last] = edit.value
    else:
        name, content = edit.value
        node[name] = content
    return out


def _same(one: Any, other: Any) -> bool:
    """Equal in value and type; 1 is not true."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return False
        return all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    # nan is never equal to itself.
    are_nan = str(one) == "nan" and str(other) == "nan"
    return are_nan or bool(one == other)


def scalar(value: Any) -> str:
    """A value as YAML 1.1 and 1.2 both read it: without quotes where both take it for a word."""
    if not isinstance(value, str):
        return write_scalar(value)
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", value) is not None
    if not is_plain or value.lower() in _IN_QUOTES:
        return write_scalar(value)
    # Such as true and .5, which have no quotes where they are no text.
    if not isinstance(read_scalar(value), str):
        return write_scalar(value)
    return value
