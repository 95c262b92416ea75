"""Comments that suppress a finding: `# dfmspec: ignore[CODE] reason`; `ignore-file` for a whole file.

The first form holds for its own line, or for the block below it. A comment that names no known code, gives no reason,
or suppresses nothing is a finding itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dfmspec.diagnostics import Diagnostic, Severity, Span
from dfmspec.read.document import Document, lines_of

_COMMENT = re.compile(r"(?:^|\s)#\s*dfmspec:\s*(.*)$")
_IGNORE = re.compile(r"ignore(-file)?\[([A-Za-z0-9, ]*)\]\s*(.*)$")
_LOADED_ANYWAY = ("SPC103", "CKP101")
"""Findings of reading after which every value is known."""


class _Suppression(NamedTuple):
    """A comment that says of some codes, and of some lines, that they are meant."""

    span: Span
    codes: tuple[str, ...]
    reason: str
    first: int
    last: int
    """The lines it covers, both included."""

    def covers(self, finding: Diagnostic) -> bool:
        """Whether a finding is in the comment's file and lines, and of one of its codes."""
        place = finding.span
        is_here = self.span.file == place.file and self.first <= place.line <= self.last
        return is_here and finding.code in self.codes


def suppressed(
    findings: Iterable[Diagnostic],
    documents: Sequence[Document],
    judged: Collection[str],
    levels: Mapping[str, str],
) -> list[Diagnostic]:
    """The findings, those that a comment covers marked with its reason; then what is wrong with the comments.

    Args:
        judged: codes whose rules ran; a comment for another one is not called unused.
        levels: the level of every code there is; those of level "load" cannot be suppressed.
    """
    # The comments, and those of them that are no suppressions.
    comments: list[_Suppression] = []
    out: list[Diagnostic] = []
    for document in documents:
        for found in _read(document, levels):
            if isinstance(found, _Suppression):
                comments.append(found)
            else:
                out.append(found)

    # The findings.
    used: set[tuple[Span, str]] = set()
    for finding in findings:
        cover = next((comment for comment in comments if comment.covers(finding)), None)
        if cover is None:
            out.append(finding)
        else:
            used.add((cover.span, finding.code))
            out.append(finding._replace(suppression=cover.reason))

    # The comments that covered nothing.
    for comment in comments:
        for code in comment.codes:
            if (comment.span, code) not in used and code in judged:
                out.append(_unused(comment, code))
    return out


def _unused(comment: _Suppression, code: str) -> Diagnostic:
    message = f"this suppresses {code}, which is not found here"
    return Diagnostic(comment.span, "SPC401", "unused-suppression", Severity.WARNING, message, "remove it")


def _malformed(span: Span, problem: str) -> Diagnostic:
    hint = "write: # dfmspec: ignore[CODE] why it is meant"
    return Diagnostic(span, "SPC402", "malformed-suppression", Severity.WARNING, problem, hint)


def _read(document: Document, levels: Mapping[str, str]) -> Iterator[_Suppression | Diagnostic]:
    """Every comment of a document that speaks to dfmspec, or what is wrong with it."""
    lines = [line.rstrip() for line in lines_of(document.text)]
    for number, line in enumerate(lines, 1):
        comment = _COMMENT.search(line)
        if comment is None:
            continue
        column = line.index("#", comment.start()) + 1
        span = Span(document.file, number, column, number, len(line) + 1)

        # What it says.
        match = _IGNORE.match(comment[1])
        if match is None:
            yield _malformed(span, "this is not ignore[CODE] reason")
            continue
        whole_file, words, reason = match.groups()
        codes = tuple(word.strip().upper() for word in words.split(",") if word.strip())
        problem = _problem(codes, reason, levels)
        if problem:
            yield _malformed(span, problem)
            continue

        # What it covers: the file, the block below a comment on a line of its own, or its line.
        is_alone = not line[: column - 1].strip()
        first = number
        last = number
        if whole_file:
            first = 0
            last = len(lines)
        elif is_alone:
            first, last = _block(lines, number)
        yield _Suppression(span, codes, reason.strip(), first, last)


def _problem(codes: tuple[str, ...], reason: str, levels: Mapping[str, str]) -> str:
    """What is wrong with a suppression; empty where nothing is."""
    if not codes:
        return "this names no code"
    unknown = [code for code in codes if code not in levels]
    if unknown:
        return f"there is no rule {unknown[0]}"
    fixed = [code for code in codes if levels[code] == "load" and code not in _LOADED_ANYWAY]
    if fixed:
        return (
            f"{fixed[0]} cannot be suppressed: "
            "it is an error of reading, and the rest is judged without what stands there"
        )
    return "" if reason.strip() else "this gives no reason"


def _block(lines: Sequence[str], comment: int) -> tuple[int, int]:
    """The lines of the entry below a comment: its own, and those indented deeper."""
    # The entry is the next line that is neither empty nor a comment.
    first = comment
    for number in range(comment + 1, len(lines) + 1):
        text = lines[number - 1].lstrip()
        if text and not text.startswith("#"):
            first = number
            break

    # It ends before the next line that is indented as far, or less.
    indent = _indent(lines[first - 1])
    last = first
    for number in range(first + 1, len(lines) + 1):
        line = lines[number - 1]
        if line.strip() and _indent(line) <= indent:
            break
        last = number
    return first, last


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
