"""Edits of a spec's text, made in place: what is not edited stays as it is, byte for byte, comments and all.

Every edit is proven by reading the result: it must be the old data with that one entry changed, or it is not made.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from dfmspec.diagnostics import Diagnostic, Edit
from dfmspec.read.document import Document, lines_of, parse_document, read_scalar, write_scalar


def fixed(document: Document, findings: Iterable[Diagnostic], *, unsafe: bool = False) -> tuple[str, list[Diagnostic]]:
    """The text of a document after the edits of its findings, and the findings that were mended.

    Edits that are not safe are left out unless unsafe is set; so is a finding of which one edit cannot be made.
    """
    mended = []
    for finding in findings:
        if not finding.fix or finding.span.file != document.file or not (unsafe or all(edit.safe for edit in finding.fix)):
            continue
        after = document
        for edit in _in_order(finding.fix):
            changed = _edited(after, edit)
            if changed is None:
                break
            after = changed
        else:
            document = after
            mended.append(finding)
    return document.text, mended


def _in_order(edits: Iterable[Edit]) -> list[Edit]:
    """Renames last: the paths of the others have the old name."""
    return sorted(edits, key=lambda edit: edit.kind == "rename")


def _edited(document: Document, edit: Edit) -> Document | None:
    """The document after one edit; None when it cannot be made, or when the result does not say exactly that."""
    key, value = document.keys.get(edit.path), document.values.get(edit.path)
    if key is None or value is None:
        return None
    if edit.kind == "rename":
        text = _replaced(document.text, key.line, key.column, key.end_line, key.end_column, edit.value)
    elif edit.kind == "set":
        text = _replaced(document.text, value.line, value.column, value.end_line, value.end_column, scalar(edit.value))
    else:
        name, content = edit.value
        lines = lines_of(document.text)
        line = lines[key.line - 1]
        if line[: key.column - 1].strip():  # inside braces, or behind a dash
            text = _replaced(document.text, value.end_line, value.end_column, value.end_line, value.end_column, f", {name}: {scalar(content)}")
        else:
            ending = line[len(line.rstrip("\r\n")) :] or "\n"
            before = "" if lines[value.end_line - 1].endswith(("\n", "\r")) else ending
            lines.insert(value.end_line, f"{before}{line[: key.column - 1]}{name}: {scalar(content)}{ending}")
            text = "".join(lines)
    after = parse_document(text.encode(), document.file)
    expected = _expected(document.data, edit)
    return after if _same(after.data, expected) and len(after.problems) <= len(document.problems) else None


def _replaced(text: str, line: int, column: int, end_line: int, end_column: int, new: str) -> str:
    lines = lines_of(text)
    head = "".join(lines[: line - 1]) + lines[line - 1][: column - 1]
    tail = "".join(lines[end_line - 1 :])[end_column - 1 :]  # a block may end where the file does
    return head + new + tail


def _expected(data: Any, edit: Edit) -> Any:
    """The data as they must be after an edit."""
    out = copy.deepcopy(data)
    node = out
    for part in edit.path[:-1]:
        node = node[part]
    last = edit.path[-1]
    if edit.kind == "rename":
        node[edit.value] = node.pop(last)
    elif edit.kind == "set":
        node[last] = edit.value
    else:
        node[edit.value[0]] = edit.value[1]
    return out


def _same(one: Any, other: Any) -> bool:
    """Equal in value and type; 1 is not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and (one == other or str(one) == str(other) == "nan")


def scalar(value: Any) -> str:
    """A value as YAML 1.1 and 1.2 both read it."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", value) and isinstance(read_scalar(value), str)
        return value if plain and value.lower() not in ("y", "n", "yes", "no", "on", "off", "none") else write_scalar(value)
    return write_scalar(value)


