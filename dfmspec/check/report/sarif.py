"""SARIF 2.1.0, for code scanning.

What a comment or a baseline suppresses stays in, marked, so that alerts are not opened again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dfmspec import __version__
from dfmspec.check.report import digest, lines_of_json, relative
from dfmspec.check.rules import RULES
from dfmspec.check.rules.base import Rule
from dfmspec.diagnostics import Diagnostic, Severity, Span

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.HINT: "note"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """One run, with the rules that it mentions."""
    used = {finding.code for finding in findings}
    rules = [_rule(rule) for rule in RULES if rule.code in used]
    index = {rule["id"]: position for position, rule in enumerate(rules)}
    driver = {"name": "dfmspec", "version": __version__, "rules": rules}
    root = {"description": {"text": "the folder dfmspec ran in"}}
    run = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"SRCROOT": root},
        "results": [],
    }
    document = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [run],
    }
    # Results are many, so they are written a line each, which is much faster than with indents.
    whole = json.dumps(document, indent=2)
    results = lines_of_json(_result(finding, index) for finding in findings)
    return whole.replace('"results": []', f'"results": {results}')


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.name.replace("-", " ")},
        "fullDescription": {"text": rule.why},
        "help": {"text": f"dfmspec rule {rule.code}"},
        "helpUri": f"https://dfmspec.dev/rules/{rule.code}.html",
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(finding: Diagnostic, index: Mapping[Any, int]) -> dict[str, Any]:
    file = relative(finding.span.file)
    identity = f"{file}:{finding.fingerprint}"
    text = f"{finding.message}\n{finding.hint}" if finding.hint else finding.message
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": index[finding.code],
        "level": _LEVELS[finding.severity],
        "message": {"text": text},
        "locations": [{"physicalLocation": _location(finding.span, file)}],
        "partialFingerprints": {"dfmspec/v1": digest(identity)[:32]},
    }
    if finding.baseline:
        result["baselineState"] = finding.baseline
    if finding.suppression is not None:
        kind = "external" if finding.suppression == "baseline" else "inSource"
        result["suppressions"] = [{"kind": kind, "justification": finding.suppression}]
    return result


def _location(span: Span, file: str) -> dict[str, Any]:
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(file), "uriBaseId": "SRCROOT"}}
    # A finding without a place is about the whole file.
    if span.line:
        location["region"] = {
            "startLine": span.line,
            "startColumn": max(1, span.column),
            "endLine": span.end_line,
            "endColumn": max(1, span.end_column),
        }
    return location


@lru_cache
def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file.strip("<>"), safe="/", errors="surrogateescape")
