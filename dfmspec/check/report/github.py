"""GitHub Actions' workflow commands: annotations on the changed files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmspec.check.report import relative
from dfmspec.diagnostics import Diagnostic, Severity, shown

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.HINT: "notice"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """Errors first: GitHub shows only so many of a step."""
    return "\n".join(_line(finding) for finding in sorted(shown(findings), key=lambda finding: -finding.severity))


def _line(finding: Diagnostic) -> str:
    span = finding.span
    places = f"file={_property(relative(span.file))},line={span.line or 1},col={span.column or 1},endLine={span.end_line or 1},endColumn={span.end_column or 1}"
    message = finding.message + (f" ({finding.hint})" if finding.hint else "")
    return f"::{_LEVELS[finding.severity]} {places},title={finding.code} {finding.name}::{_data(message)}"


def _data(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\r\n" else " " for c in text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
