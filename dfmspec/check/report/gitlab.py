"""GitLab's code quality report (a subset of Code Climate's)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dfmspec.check.report import digest, lines_of_json, relative, with_hint
from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed

_SEVERITIES = {Severity.ERROR: "major", Severity.WARNING: "minor", Severity.HINT: "info"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """A list of issues, each with a fingerprint of its own."""
    seen: Counter[str] = Counter()
    issues = []
    for finding in not_suppressed(findings):
        # Without a line in it, a fingerprint outlives edits above; equal ones are counted apart.
        file = relative(finding.span.file)
        identity = f"{file}:{finding.fingerprint}"
        seen[identity] += 1
        fingerprint = f"{identity}:{seen[identity]}"
        lines = {
            "begin": max(1, finding.span.line),
            "end": max(1, finding.span.end_line),
        }
        issues.append(
            {
                "description": with_hint(finding),
                "check_name": finding.code,
                "fingerprint": digest(fingerprint),
                "severity": _SEVERITIES[finding.severity],
                "location": {"path": file, "lines": lines},
            }
        )
    return lines_of_json(issues)
