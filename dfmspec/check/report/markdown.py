"""A table in Markdown: for pull requests, and for the summary of a GitHub step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmspec.check.report import relative
from dfmspec.check.report.text import summary
from dfmspec.diagnostics import Diagnostic, not_suppressed


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """Errors first, one row each."""
    kept = sorted(not_suppressed(findings), key=lambda finding: -finding.severity)
    if not kept:
        files = sum(not file.startswith("<") for file in texts)
        return f"**dfmspec**: {files} files, no findings"
    lines = [
        f"**dfmspec**: {summary(kept)}",
        "",
        "| | rule | place | finding |",
        "|---|---|---|---|",
        *(_row(finding) for finding in kept),
    ]
    return "\n".join(lines)


def _row(finding: Diagnostic) -> str:
    file = relative(finding.span.file)
    text = _cell(finding.message)
    if finding.hint:
        text += "<br>" + _cell(finding.hint)
    place = f"{file}:{finding.span.line}" if finding.span.line else file
    return f"| {finding.severity.label} | {finding.code} {finding.name} | `{place}` | {text} |"


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
