"""JSON, one finding a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from dfmspec.check.report.as_json import entry
from dfmspec.diagnostics import Diagnostic


def report(findings: Sequence[Diagnostic], texts: Mapping[str, str]) -> str:
    """One object a line, with the fields of an entry of the json form's `findings`."""
    return "\n".join(json.dumps(entry(finding)) for finding in findings)
