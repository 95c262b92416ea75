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
    "full": "text", "concise": "concise", "json": "as_json", "jsonl": "jsonl", "github": "github", "sarif": "sarif", "junit": "junit",
    "gitlab": "gitlab", "rdjson": "rdjson", "markdown": "markdown",
}  # fmt: skip


def reporter(name: str) -> Report:
    """The `report` function of a form."""
    report: Report = import_module(f"dfmspec.check.report.{REPORTERS[name]}").report
    return report


def printable(text: str) -> str:
    """One line, without what a terminal or a log would take for a command."""
    return text if text.isprintable() else "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def lines_of_json(entries: Iterable[Any]) -> str:
    """A JSON list with one entry a line: read by people and diffed by lines, and written ten times faster than with indents."""
    return "[" + ",".join(f"\n{json.dumps(entry)}" for entry in entries) + "\n]"


def relative(file: str) -> str:
    """A file as tools that look at a checkout want it: relative to the working directory, with slashes."""
    import os
    from pathlib import Path

    if file[:1] == "<" or not file.startswith("/"):
        return file.removeprefix("./")
    near = os.path.relpath(file)
    return file if near.startswith("..") else Path(near).as_posix()
