"""How findings are shown: one file a form. A new one is a file here and a line in REPORTERS."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

from dfmspec.diagnostics import Diagnostic

Report = Callable[[Sequence[Diagnostic], Mapping[str, str]], str]
"""(findings, text of each file) -> what is printed."""

REPORTERS = {"full": "text", "concise": "concise", "json": "as_json", "github": "github"}


def reporter(name: str) -> Report:
    """The `report` function of a form."""
    report: Report = import_module(f"dfmspec.report.{REPORTERS[name]}").report
    return report
