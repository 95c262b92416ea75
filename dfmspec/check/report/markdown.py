"""A table in Markdown: for pull requests, and for the summary of a GitHub step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dfmspec.check.report import relative
from dfmspec.check.report.text import summary
from dfmspec.diagnostics import Diagnostic, shown


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """Errors first, one row each."""
    kept = sorted(shown(findings), key=lambda finding: -finding.severity)
    if not kept:
        return f"**dfmspec**: {len([file for file in texts if file[:1] != '<'])} files, no findings"
    rows = [
        f"| {finding.severity.label} | {finding.code} {finding.name} | `{relative(finding.span.file)}:{finding.span.line}` "
        f"| {_cell(finding.message)}{f'<br>{_cell(finding.hint)}' if finding.hint else ''} |"
        for finding in kept
    ]
    return "\n".join([f"**dfmspec**: {summary(kept)}", "", "| | rule | place | finding |", "|---|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
