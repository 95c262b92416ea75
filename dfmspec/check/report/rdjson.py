"""reviewdog's rdjson."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dfmspec.check.report import lines_of_json, relative, with_hint
from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed

_SEVERITIES = {Severity.ERROR: "ERROR", Severity.WARNING: "WARNING", Severity.HINT: "INFO"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """{"source", "diagnostics": [...]}."""
    diagnostics = lines_of_json(map(_diagnostic, not_suppressed(findings)))
    return f'{{"source": {{"name": "dfmspec"}}, "diagnostics": {diagnostics}}}'


def _diagnostic(finding: Diagnostic) -> dict[str, Any]:
    span = finding.span
    location: dict[str, Any] = {"path": relative(span.file)}
    # A finding without a place is about the whole file.
    if span.line:
        location["range"] = {
            "start": {"line": span.line, "column": span.column},
            "end": {"line": span.end_line, "column": span.end_column},
        }
    return {
        "message": with_hint(finding),
        "location": location,
        "severity": _SEVERITIES[finding.severity],
        "code": {"value": finding.code},
    }
