"""Comments that suppress a finding: `# dfmspec: ignore[CODE] reason`, on its line or above its block; `ignore-file` for a whole file.

A comment that names no known code, gives no reason, or suppresses nothing is a finding itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dfmspec.diagnostics import Diagnostic, Severity, Span
from dfmspec.read.document import Document, lines_of

_COMMENT = re.compile(r"(?:^|\s)#\s*dfmspec:\s*(.*)$")
_IGNORE = re.compile(r"ignore(-file)?\[([A-Za-z0-9, ]*)\]\s*(.*)$")


@dataclass(frozen=True)
class _Suppression:
    span: Span
    codes: tuple[str, ...]
    reason: str
    first: int
    last: int
    """The lines it covers, both included."""


def suppressed(findings: Iterable[Diagnostic], documents: Sequence[Document], judged: Collection[str], levels: Mapping[str, str]) -> list[Diagnostic]:
    """The findings, those that a comment covers marked with its reason; then what is wrong with the comments.

    Args:
        judged: codes whose rules ran; a comment for another one is not called unused.
        levels: the level of every code there is; those of level "load" cannot be suppressed.
    """
    comments: list[_Suppression] = []
    out: list[Diagnostic] = []
    for document in documents:
        for found in _read(document, levels):
            (comments if isinstance(found, _Suppression) else out).append(found)  # type: ignore[arg-type]
    used: set[tuple[Span, str]] = set()
    for finding in findings:
        cover = next((c for c in comments if c.span.file == finding.span.file and c.first <= finding.span.line <= c.last and finding.code in c.codes), None)
        if cover is not None:
            used.add((cover.span, finding.code))
        out.append(finding if cover is None else finding._replace(suppression=cover.reason))
    for comment in comments:
        for code in comment.codes:
            if (comment.span, code) not in used and code in judged:
                message, hint = f"this suppresses {code}, which is not found here", "remove it"
                out.append(Diagnostic(comment.span, "SPC401", "unused-suppression", Severity.WARNING, message, hint))
    return out


def _read(document: Document, levels: Mapping[str, str]) -> Iterable[_Suppression | Diagnostic]:
    lines = [line.rstrip() for line in lines_of(document.text)]
    for number, line in enumerate(lines, 1):
        comment = _COMMENT.search(line)
        if comment is None:
            continue
        span = Span(document.file, number, line.index("#", comment.start()) + 1, number, len(line) + 1)
        match = _IGNORE.match(comment[1])
        codes = tuple(code.strip().upper() for code in match[2].split(",") if code.strip()) if match else ()
        problem = _problem(codes, match[3] if match else "", levels) if match else "this is not ignore[CODE] reason"
        if problem:
            yield Diagnostic(span, "SPC402", "malformed-suppression", Severity.WARNING, problem, "write: # dfmspec: ignore[CODE] why it is meant")
        elif match:
            alone = not line[: span.column - 1].strip()
            first, last = (0, len(lines)) if match[1] else _block(lines, number) if alone else (number, number)
            yield _Suppression(span, codes, match[3].strip(), first, last)


def _problem(codes: tuple[str, ...], reason: str, levels: Mapping[str, str]) -> str:
    if not codes:
        return "this names no code"
    if unknown := [code for code in codes if code not in levels]:
        return f"there is no rule {unknown[0]}"
    if fixed := [code for code in codes if levels[code] == "load" and code not in ("SPC103", "CKP101")]:
        return f"{fixed[0]} cannot be suppressed: it is an error of reading, and the rest is judged without what stands there"
    return "" if reason.strip() else "this gives no reason"


def _block(lines: Sequence[str], comment: int) -> tuple[int, int]:
    """The lines of the entry below a comment: its own, and those indented deeper."""
    first = next((n for n in range(comment + 1, len(lines) + 1) if lines[n - 1].strip() and not lines[n - 1].lstrip().startswith("#")), comment)
    indent = len(lines[first - 1]) - len(lines[first - 1].lstrip())
    last = first
    for number in range(first + 1, len(lines) + 1):
        line = lines[number - 1]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        last = number
    return first, last
