"""The form for people: errors first, each with the line it is about and a caret under the place; hints when asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TextIO

from dfmspec.check.report import printable
from dfmspec.colours import BLUE, CYAN, GREEN, RED, YELLOW, painted
from dfmspec.diagnostics import COMMAND_LINE, UNASKED, Diagnostic, Severity, Span, not_suppressed
from dfmspec.read.document import lines_of
from dfmspec.redaction import masked

_COLOURS = {Severity.ERROR: RED, Severity.WARNING: YELLOW, Severity.HINT: CYAN}

_WIDTH = 160
"""How many characters of a line are shown."""
_LAYERS = {
    "default": "the target's default",
    "profile": "a profile",
    "extends": "a file that the spec extends",
    "config file": "the spec's config_file",
    "flag": "a flag",
}
"""How a layer is called where the place alone does not tell."""


def report(
    findings: Sequence[Diagnostic], texts: Mapping[str, str], *, hints: bool = True, stream: TextIO | None = None
) -> str:
    """All findings, the worst first, then a count; nothing for nothing.

    Those about values that nobody set stand in a block of their own, without a line that would be at fault.

    Args:
        findings: those of all files.
        texts: of each file.
        hints: whether hints are shown, rather than counted.
        stream: where it is printed; None: on stdout.
    """
    to = stream or sys.stdout
    worst_first = sorted(not_suppressed(findings), key=lambda finding: -finding.severity)
    shown = [finding for finding in worst_first if hints or finding.severity > Severity.HINT]
    shown = [finding for finding in shown if finding.code != UNASKED]
    blocks = [render(finding, texts.get(finding.span.file, ""), to) for finding in shown if not finding.is_of_nobody]
    unset = [render(finding, "", to) for finding in shown if finding.is_of_nobody]
    if unset:
        blocks += ["About values that the spec does not set:", *unset]
    blocks += [f"note: {finding.message}" for finding in worst_first if finding.code == UNASKED]
    counted = [finding for finding in worst_first if finding.code != UNASKED]
    if shown:
        folded = ""
        if not hints and any(finding.severity is Severity.HINT for finding in counted):
            folded = " (--hints shows them)"
        blocks.append(summary(counted) + folded)
    return "\n\n".join(blocks)


def render(finding: Diagnostic, text: str = "", stream: TextIO | None = None) -> str:
    """One finding: place, severity and code, message, the line, one way out; as the stream (None: stdout) shows it."""
    to = stream or sys.stdout
    place = printable(finding.span.file if finding.is_of_nobody else str(finding.span))
    label = painted(finding.severity.label, _COLOURS[finding.severity], to)
    message = printable(finding.message)
    lines = [f"{place}: {label}: {message} [{finding.code} {finding.name}]"]
    # A secret is not printed again.
    if not finding.code.startswith("SEC"):
        lines += _frame(finding.span, text, to)
    # Why a value is what it is, where no line of the spec says it.
    if finding.layer and not finding.layer.startswith("derived"):
        word = painted("from", BLUE, to)
        layer = _LAYERS.get(finding.layer, finding.layer)
        lines.append(f"  {word}: {layer}")
    if finding.hint:
        word = painted("help", GREEN, to)
        lines.append(f"  {word}: {printable(finding.hint)}")
    return "\n".join(lines)


def _frame(span: Span, text: str, stream: TextIO) -> list[str]:
    """The line of the finding, and carets under the place."""
    lines = _shown_lines(text)
    if not span.line or span.line > len(lines):
        return []
    line = printable(lines[span.line - 1])
    if span.column > _WIDTH:
        return [f"  {span.line} | {line}"]

    # A place of several lines is marked to the end of its first.
    end = len(line) + 1
    if span.end_line == span.line:
        end = min(end, span.end_column)
    width = max(1, end - span.column)
    carets = " " * (span.column - 1) + painted("^" * width, RED, stream)

    # An override has no number that a reader could look up.
    gutter = " " if span.file == COMMAND_LINE else str(span.line)
    margin = " " * len(gutter)
    return [f"  {gutter} | {line}", f"  {margin} | {carets}"]


@lru_cache(maxsize=8)
def _shown_lines(text: str) -> tuple[str, ...]:
    """The lines of a text as a terminal shows them: tabs as wide as the carets take them to be, and no secrets."""
    return tuple(line.rstrip()[:_WIDTH].replace("\t", " ") for line in lines_of(masked(text)))


def summary(findings: Sequence[Diagnostic]) -> str:
    """How many there are of each severity, the worst first: "2 errors, 1 hint"."""
    words = []
    for severity in reversed(Severity):
        count = sum(finding.severity is severity for finding in findings)
        if count:
            plural = "" if count == 1 else "s"
            words.append(f"{count} {severity.label}{plural}")
    return ", ".join(words)
