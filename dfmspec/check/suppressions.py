"""Comments that suppress a finding: `# dfmspec: ignore[CODE] reason`; `ignore-file` for a whole file.

The first form holds for its own line, or for the block below it. A comment that names no known code, gives no reason,
or suppresses nothing is a finding itself.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
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


_Place = tuple[str, str, int]
"""File, code and line of a finding."""


def suppressed(
    findings: Iterable[Diagnostic],
    documents: Sequence[Document],
    judged: Collection[str],
    levels: Mapping[str, str],
) -> list[Diagnostic]:
    """The findings, those that a comment covers marked with its reason; then what is wrong with the comments.

    Args:
        judged: codes whose rules ran; a comment for another one is not called unused.
        levels: the level of every code there is; those of levels "load" and "policy" cannot be suppressed.
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
    findings = list(findings)
    covers = _covers(findings, comments)
    used: set[tuple[Span, str]] = set()
    for finding in findings:
        cover = covers.get((finding.span.file, finding.code, finding.span.line))
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


def _covers(findings: Iterable[Diagnostic], comments: Iterable[_Suppression]) -> dict[_Place, _Suppression]:
    """The first comment that covers each place where something is found; each place is met once, however many cover."""
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for finding in findings:
        places[finding.span.file, finding.code].add(finding.span.line)
    open_lines = {key: sorted(lines) for key, lines in places.items()}

    covers: dict[_Place, _Suppression] = {}
    for comment in comments:
        file = comment.span.file
        for code in comment.codes:
            lines = open_lines.get((file, code), [])
            low = bisect_left(lines, comment.first)
            high = bisect_right(lines, comment.last)
            covers.update({(file, code, line): comment for line in lines[low:high]})
            del lines[low:high]
    return covers


def _unused(comment: _Suppression, code: str) -> Diagnostic:
    message = f"this suppresses {code}, which is not found here"
    return Diagnostic(comment.span, "SPC401", "unused-suppression", Severity.WARNING, message, "remove it")


def _malformed(span: Span, problem: str) -> Diagnostic:
    hint = "write: # dfmspec: ignore[CODE] why it is meant"
    return Diagnostic(span, "SPC402", "malformed-suppression", Severity.WARNING, problem, hint)


def _read(document: Document, levels: Mapping[str, str]) -> Iterator[_Suppression | Diagnostic]:
    """Every comment of a document that speaks to dfmspec, or what is wrong with it."""
    lines = [line.rstrip() for line in lines_of(document.text)]
    blocks = _Blocks(lines)
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
            first, last = blocks.below(number)
        yield _Suppression(span, codes, reason.strip(), first, last)


def _problem(codes: tuple[str, ...], reason: str, levels: Mapping[str, str]) -> str:
    """What is wrong with a suppression; empty where nothing is."""
    if not codes:
        return "this names no code"
    unknown = [code for code in codes if code not in levels]
    if unknown:
        return f"there is no rule {unknown[0]}"
    fixed = [code for code in codes if levels[code] in ("load", "policy", "fault") and code not in _LOADED_ANYWAY]
    if fixed and levels[fixed[0]] == "policy":
        return f"{fixed[0]} cannot be suppressed: it is the site's policy that says so"
    if fixed:
        return (
            f"{fixed[0]} cannot be suppressed: "
            "it is an error of reading, and the rest is judged without what stands there"
        )
    return "" if reason.strip() else "this gives no reason"


class _Blocks:
    """The blocks of a text by their indentation, found in one pass."""

    def __init__(self, lines: Sequence[str]) -> None:
        count = len(lines)
        self._entry = [0] * (count + 2)
        """For each line number, the next line behind it that is neither empty nor a comment; 0: none."""
        self._last = [count] * (count + 2)
        """For each line number, the last line that is indented deeper, with what stands between."""

        # From the end: what still waits for a line that is indented as far as it, or less.
        entry = 0
        waiting: list[tuple[int, int]] = []
        for number in range(count, 0, -1):
            self._entry[number] = entry
            text = lines[number - 1].lstrip()
            indent = len(lines[number - 1]) - len(text)
            if not text:
                continue
            while waiting and waiting[-1][0] > indent:
                waiting.pop()
            if waiting:
                self._last[number] = waiting[-1][1] - 1
            waiting.append((indent, number))
            if not text.startswith("#"):
                entry = number

    def below(self, comment: int) -> tuple[int, int]:
        """The lines of the entry below a comment: its own, and those indented deeper."""
        first = self._entry[comment] or comment
        return first, self._last[first]
