"""JSON, for programs; `schema_version` grows when a field changes its meaning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dfmspec import __version__
from dfmspec.check.report import lines_of_json
from dfmspec.diagnostics import Diagnostic, dotted


def entry(finding: Diagnostic) -> dict[str, Any]:
    """One finding, all of its fields in this order."""
    span = finding.span
    return {
        "file": span.file,
        "line": span.line,
        "column": span.column,
        "end_line": span.end_line,
        "end_column": span.end_column,
        "severity": finding.severity.label,
        "code": finding.code,
        "name": finding.name,
        "message": finding.message,
        "hint": finding.hint,
        "path": dotted(finding.path),
        "layer": finding.layer,
        "suppressed": finding.suppression,
    }


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """{"schema_version", "tool", "findings": [...]}."""
    tool = json.dumps({"name": "dfmspec", "version": __version__})
    entries = lines_of_json(map(entry, findings))
    return f'{{"schema_version": 1, "tool": {tool}, "findings": {entries}}}'
