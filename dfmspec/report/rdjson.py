"""reviewdog's rdjson."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dfmspec.diagnostics import Diagnostic, Severity, shown
from dfmspec.report import relative

_SEVERITIES = {Severity.ERROR: "ERROR", Severity.WARNING: "WARNING", Severity.HINT: "INFO"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """{"source", "diagnostics": [...]}."""
    source = {"name": "dfmspec"}
    return json.dumps({"source": source, "diagnostics": [_diagnostic(finding) for finding in shown(findings)]}, indent=2)


def _diagnostic(finding: Diagnostic) -> dict[str, Any]:
    span = finding.span
    location: dict[str, Any] = {"path": relative(span.file)}
    if span.line:
        location["range"] = {"start": {"line": span.line, "column": span.column}, "end": {"line": span.end_line, "column": span.end_column}}
    return {
        "message": finding.message + (f" ({finding.hint})" if finding.hint else ""), "location": location, "severity": _SEVERITIES[finding.severity],
        "code": {"value": finding.code},
    }  # fmt: skip
