"""The form for people: each finding with the line it is about and a caret under the place."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache

from dfmspec.check.report import printable
from dfmspec.diagnostics import COMMAND_LINE, Diagnostic, Severity, Span, shown
from dfmspec.read.document import lines_of

_COLOURS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.HINT: "36"}


_LAYERS = {"default": "the target's default", "extends": "a file that the spec extends", "config file": "the spec's config_file", "flag": "a flag"}
"""How a layer is called where the place alone does not tell."""


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """All findings, then a count; nothing for nothing."""
    findings = shown(findings)
    if not findings:
        return ""
    blocks = [render(finding, texts.get(finding.span.file, "")) for finding in findings]
    return "\n\n".join(blocks) + f"\n\n{summary(findings)}"


def render(finding: Diagnostic, text: str = "") -> str:
    """One finding: place, severity and code, message, the line, one way out."""
    label = _colour(f"{finding.severity.label}", _COLOURS[finding.severity])
    lines = [f"{printable(str(finding.span))}: {label}: {printable(finding.message)} [{finding.code} {finding.name}]"]
    if not finding.code.startswith("SEC"):  # a secret is not printed again
        lines += _frame(finding.span, text)
    if finding.layer and not finding.layer.startswith("derived"):
        lines.append(f"  {_colour('from', '34')}: {_LAYERS.get(finding.layer, finding.layer)}")
    if finding.hint:
        lines.append(f"  {_colour('help', '32')}: {printable(finding.hint)}")
    return "\n".join(lines)


def _frame(span: Span, text: str) -> list[str]:
    """The line of the finding, and carets under the place."""
    lines = lines_of(text)
    if not span.line or span.line > len(lines):
        return []
    line = printable(lines[span.line - 1].rstrip().replace("\t", " ")[:160])
    end = span.end_column if span.end_line == span.line else len(line) + 1
    width = max(1, min(end, len(line) + 1) - span.column)
    gutter = str(span.line) if span.file != COMMAND_LINE else " "
    return [f"  {gutter} | {line}", f"  {' ' * len(gutter)} | {' ' * (span.column - 1)}{_colour('^' * width, '31')}"]


def summary(findings: Sequence[Diagnostic]) -> str:
    """"2 errors, 1 hint"."""
    counts = [(severity, sum(finding.severity is severity for finding in findings)) for severity in reversed(Severity)]
    return ", ".join(f"{count} {severity.label}{'s' if count != 1 else ''}" for severity, count in counts if count)


def _colour(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if coloured() else text


@lru_cache
def coloured() -> bool:
    """Colours on a terminal only, and never under NO_COLOR."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()
