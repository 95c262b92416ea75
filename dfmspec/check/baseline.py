"""Findings that a project has accepted: a JSON file that says which and how often, so that only new ones count."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from dfmspec.diagnostics import Diagnostic
from dfmspec.errors import UsageError


def write_baseline(findings: Iterable[Diagnostic], file: Path) -> None:
    """Accept the findings that nothing suppresses."""
    counts = Counter(_key(finding, file) for finding in findings if finding.suppression is None)
    entries = [{"file": name, "finding": fingerprint, "count": count} for (name, fingerprint), count in sorted(counts.items())]
    file.write_text(json.dumps({"schema_version": 1, "findings": entries}, indent=2) + "\n")


def apply_baseline(findings: Iterable[Diagnostic], file: Path) -> list[Diagnostic]:
    """The findings, those that the baseline accepts marked.

    Raises:
        UsageError: the file is no baseline.
    """
    try:
        entries = json.loads(file.read_text())["findings"]
        left = Counter({(str(entry["file"]), str(entry["finding"])): int(entry["count"]) for entry in entries})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--baseline {file} cannot be read: {error}; make one with --write-baseline") from error
    out = []
    for finding in findings:
        accepted = finding.suppression is None and left[_key(finding, file)] > 0
        left[_key(finding, file)] -= accepted
        out.append(finding._replace(suppression="baseline") if accepted else finding)
    return out


def _key(finding: Diagnostic, file: Path) -> tuple[str, str]:
    """The file relative to the baseline, so that both can move; and the finding's identity."""
    name = finding.span.file
    return (name if name[:1] == "<" else Path(os.path.relpath(name, file.parent)).as_posix(), finding.fingerprint)
