"""Findings that a project has accepted: a JSON file that says which and how often, so that only new ones count."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from dfmspec.bounded import METADATA_BYTES, read_text
from dfmspec.diagnostics import Diagnostic
from dfmspec.errors import UsageError
from dfmspec.files import write_named


def write_baseline(findings: Iterable[Diagnostic], file: Path) -> None:
    """Accept the findings that nothing suppresses."""
    counts = Counter(_key(finding, file) for finding in findings if finding.suppression is None)
    entries = []
    for (name, fingerprint), count in sorted(counts.items()):
        entries.append({"file": name, "finding": fingerprint, "count": count})
    document = {"schema_version": 1, "findings": entries}
    write_named(file, json.dumps(document, indent=2) + "\n")


def apply_baseline(findings: Iterable[Diagnostic], file: Path) -> list[Diagnostic]:
    """The findings, those that the baseline accepts marked.

    Raises:
        UsageError: the file is no baseline.
    """
    return marked(findings, _read(file), lambda finding: _key(finding, file))


Key = tuple[str, str]
"""A file, and a finding's identity."""


def marked(
    findings: Iterable[Diagnostic], known: Counter[Key], key_of: Callable[[Diagnostic], Key]
) -> list[Diagnostic]:
    """The findings, each marked as new or as known before; those that are known do not count.

    Args:
        findings: of today.
        known: how many of each key are known.
        key_of: a finding's key.
    """
    left = known.copy()
    out = []
    for finding in findings:
        key = key_of(finding)
        # Each entry accepts as many findings as it counts; one more is new. A policy's are nobody's to accept.
        if left[key] <= 0 or finding.is_of_the_site:
            out.append(finding._replace(baseline="new"))
            continue
        left[key] -= 1
        suppression = finding.suppression if finding.suppression is not None else "baseline"
        out.append(finding._replace(suppression=suppression, baseline="unchanged"))
    return out


def _read(file: Path) -> Counter[tuple[str, str]]:
    """How many findings of each key a baseline accepts."""
    counts: Counter[tuple[str, str]] = Counter()
    try:
        for entry in json.loads(read_text(file, most=METADATA_BYTES, may_be_a_pipe=True))["findings"]:
            key = (str(entry["file"]), str(entry["finding"]))
            counts[key] = int(entry["count"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"--baseline {file} cannot be read: {error}; make one with --write-baseline") from error
    return counts


def _key(finding: Diagnostic, file: Path) -> tuple[str, str]:
    """The file relative to the baseline, so that both can move; and the finding's identity."""
    name = finding.span.file
    # <command line> and <defaults> are no files.
    if not name.startswith("<"):
        name = Path(os.path.relpath(name, file.parent)).as_posix()
    return name, finding.fingerprint
