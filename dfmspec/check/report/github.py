"""GitHub Actions' workflow commands: annotations on the changed files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmspec.check.report import relative, with_hint
from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.HINT: "notice"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """Errors first: GitHub shows only so many of a step."""
    worst_first = sorted(not_suppressed(findings), key=lambda finding: -finding.severity)
    return "\n".join(_line(finding) for finding in worst_first)


def _line(finding: Diagnostic) -> str:
    # A finding without a place is shown at the file's beginning.
    span = finding.span
    properties = {
        "file": _property(relative(span.file)),
        "line": span.line or 1,
        "col": span.column or 1,
        "endLine": span.end_line or 1,
        "endColumn": span.end_column or 1,
        "title": f"{finding.code} {finding.name}",
    }
    words = ",".join(f"{name}={value}" for name, value in properties.items())
    message = _data(with_hint(finding))
    return f"::{_LEVELS[finding.severity]} {words}::{message}"


def _data(text: str) -> str:
    """A message as a command carries it: ends of lines are escaped, other control characters dropped."""
    kept = "".join(character if _is_carried(character) else " " for character in text)
    return kept.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _is_carried(character: str) -> bool:
    return character.isprintable() or character in "\r\n"


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
