"""JSON, for programs; `schema_version` grows when a field changes its meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dfmspec.diagnostics import Diagnostic, dotted


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """{"schema_version", "findings": [...]}."""
    entries = [
        {
            "file": finding.span.file, "line": finding.span.line, "column": finding.span.column,
            "end_line": finding.span.end_line, "end_column": finding.span.end_column,
            "severity": finding.severity.label, "code": finding.code, "name": finding.name,
            "message": finding.message, "hint": finding.hint, "path": dotted(finding.path),
        }
        for finding in findings
    ]  # fmt: skip
    return json.dumps({"schema_version": 1, "findings": entries}, indent=2)
