"""How findings are shown: one file a form. A new one is a file here and a line in REPORTERS."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

from dfmspec.diagnostics import Diagnostic

Report = Callable[[Sequence[Diagnostic], Mapping[str, str]], str]
"""(findings, suppressed ones among them; text of each file) -> what is printed."""

REPORTERS = {
    "full": "text",
    "concise": "concise",
    "json": "as_json",
    "jsonl": "jsonl",
    "github": "github",
    "sarif": "sarif",
    "junit": "junit",
    "gitlab": "gitlab",
    "rdjson": "rdjson",
    "markdown": "markdown",
}
"""Form -> its module."""


def reporter(name: str) -> Report:
    """The `report` function of a form."""
    report: Report = import_module(f"dfmspec.check.report.{REPORTERS[name]}").report
    return report


def printable(text: str) -> str:
    """One line, without what a terminal or a log would take for a command."""
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    """A character as Python's source would write it, where it cannot be printed."""
    return character if character.isprintable() else repr(character)[1:-1]


def with_hint(finding: Diagnostic) -> str:
    """The message, and the hint in brackets: for forms that have one text a finding."""
    return f"{finding.message} ({finding.hint})" if finding.hint else finding.message


def lines_of_json(entries: Iterable[Any]) -> str:
    """A JSON list with one entry a line: read by people, diffed by lines, written ten times faster than indented."""
    lines = (f"\n{json.dumps(entry)}" for entry in entries)
    return "[" + ",".join(lines) + "\n]"


def digest(text: str) -> str:
    """sha256 of a text, in which the name of a file may have bytes that are no UTF-8."""
    import hashlib

    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def relative(file: str) -> str:
    """A file as tools that look at a checkout want it: relative to the working directory, with slashes."""
    import os
    from pathlib import Path

    if not file.startswith("/"):
        return file.removeprefix("./")
    near = os.path.relpath(file)
    # Outside of the checkout, only the whole path says anything.
    return file if near.startswith("..") else Path(near).as_posix()
