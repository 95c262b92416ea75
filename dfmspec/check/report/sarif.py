"""SARIF 2.1.0, for code scanning. What a comment or a baseline suppresses stays in, marked, so that alerts are not opened again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dfmspec import __version__
from dfmspec.check.report import lines_of_json, relative
from dfmspec.check.rules import RULES
from dfmspec.diagnostics import Diagnostic, Severity

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.HINT: "note"}


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """One run, with the rules that it mentions."""
    used = {finding.code for finding in findings}
    rules = [
        {
            "id": rule.code, "name": rule.name, "shortDescription": {"text": rule.name.replace("-", " ")}, "fullDescription": {"text": rule.why},
            "help": {"text": f"dfmspec rule {rule.code}"}, "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        }
        for rule in RULES if rule.code in used
    ]  # fmt: skip
    index = {rule["id"]: position for position, rule in enumerate(rules)}
    driver = {"name": "dfmspec", "version": __version__, "rules": rules}
    run = {
        "tool": {"driver": driver}, "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {"SRCROOT": {"description": {"text": "the folder dfmspec ran in"}}},
        "results": [],
    }  # fmt: skip
    whole = json.dumps({"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}, indent=2)
    return whole.replace('"results": []', f'"results": {lines_of_json(_result(finding, index) for finding in findings)}')


def _result(finding: Diagnostic, index: Mapping[Any, int]) -> dict[str, Any]:
    file = relative(finding.span.file)
    location: dict[str, Any] = {"artifactLocation": {"uri": _uri(file), "uriBaseId": "SRCROOT"}}
    if finding.span.line:
        span = finding.span
        location["region"] = {"startLine": span.line, "startColumn": max(1, span.column), "endLine": span.end_line, "endColumn": max(1, span.end_column)}
    identity = hashlib.sha256(f"{file}:{finding.fingerprint}".encode()).hexdigest()[:32]
    result: dict[str, Any] = {
        "ruleId": finding.code, "ruleIndex": index[finding.code], "level": _LEVELS[finding.severity],
        "message": {"text": finding.message + (f"\n{finding.hint}" if finding.hint else "")},
        "locations": [{"physicalLocation": location}], "partialFingerprints": {"dfmspec/v1": identity},
    }  # fmt: skip
    if finding.suppression is not None:
        kind = "external" if finding.suppression == "baseline" else "inSource"
        result["suppressions"] = [{"kind": kind, "justification": finding.suppression}]
    return result


@lru_cache
def _uri(file: str) -> str:
    from urllib.parse import quote

    return quote(file.strip("<>"), safe="/")
