"""GitLab's code quality report (a subset of Code Climate's)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from dfmspec.check.report import lines_of_json, relative
from dfmspec.diagnostics import Diagnostic, Severity, shown

_SEVERITIES = {Severity.ERROR: "major", Severity.WARNING: "minor", Severity.HINT: "info"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """A list of issues, each with a fingerprint of its own."""
    seen: Counter[str] = Counter()
    issues = []
    for finding in shown(findings):
        file = relative(finding.span.file)
        identity = f"{file}:{finding.fingerprint}"
        seen[identity] += 1
        issues.append({
            "description": finding.message + (f" ({finding.hint})" if finding.hint else ""), "check_name": finding.code,
            "fingerprint": hashlib.sha256(f"{identity}:{seen[identity]}".encode()).hexdigest(), "severity": _SEVERITIES[finding.severity],
            "location": {"path": file, "lines": {"begin": max(1, finding.span.line), "end": max(1, finding.span.end_line)}},
        })  # fmt: skip
    return lines_of_json(issues)
