"""One line a finding: file:line:column: severity: message [code name]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmspec.diagnostics import Diagnostic


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """All findings, a line each."""
    return "\n".join(
        f"{finding.span}: {finding.severity.label}: {finding.message} [{finding.code} {finding.name}]" for finding in findings
    )
