"""One line a finding: file:line:column: severity: message [code name]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmspec.check.report import printable
from dfmspec.diagnostics import Diagnostic, not_suppressed


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """All findings, a line each."""
    return "\n".join(printable(_line(finding)) for finding in not_suppressed(findings))


def _line(finding: Diagnostic) -> str:
    return f"{finding.span}: {finding.severity.label}: {finding.message} [{finding.code} {finding.name}]"
