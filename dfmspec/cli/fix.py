"""dfmspec fix: mend in a spec what can only have been meant otherwise."""

from __future__ import annotations

import codecs
import difflib
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dfmspec.cli.arguments import (
    cells_checked,
    complete_override,
    counted_errors,
    load_checked,
    split_words,
    stop_at_faults,
)
from dfmspec.cli.validate import expanded
from dfmspec.cli.voice import note
from dfmspec.diagnostics import Diagnostic, Edit, Severity, dotted
from dfmspec.diagnostics import Path as Path_
from dfmspec.errors import FINDINGS, UsageError
from dfmspec.read.document import Document, lines_of
from dfmspec.read.fixes import fixed, scalar
from dfmspec.targets import TARGETS
from dfmspec.targets.renames import RENAMES

_LEVELS = ("spec", "paths")
_ROUNDS = 5
"""One mended fault may uncover another."""

_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC... [KEY=VALUE]...",
        help="Specs to mend, and overrides under which to look.",
        show_default=False,
        autocompletion=complete_override,
    ),
]
_Diff = Annotated[
    bool,
    typer.Option("--diff", help="Show what would change, and change nothing; exit code 1 if anything would."),
]
_Unsafe = Annotated[
    bool,
    typer.Option("--unsafe", help="Also what may change the meaning, such as the nearest batch size that works."),
]


_Upgrade = Annotated[
    bool,
    typer.Option("--upgrade", help="Also keys under the names of other versions of the target, such as validation.*."),
]


def fix(
    words: _Words,
    diff: _Diff = False,
    unsafe: _Unsafe = False,
    upgrade: _Upgrade = False,
) -> None:
    """Mend names, numbers and stale copies in place.

    Comments and layout stay as they are. Exit code 0: no error is left. 1: some are, or --diff would change something.

    Example: dfmspec fix --diff specs/
    """
    # Mend each file.
    files, overrides = split_words(words)
    has_changed = False
    left = 0
    faults: list[Diagnostic] = []
    for file in expanded(files):
        if file == "-":
            raise UsageError("fix works on files; stdin has no place to write to")
        mended = _mended(file, overrides, unsafe=unsafe, upgrade=upgrade)
        left += mended.errors
        faults += mended.faults
        if mended.after == mended.before:
            continue
        has_changed = True
        if diff:
            _show_difference(file, mended)
            continue
        _write(Path(file), mended.after)
        for finding, edits in mended.findings:
            for edit in edits:
                note(f"{finding.span}: {edit} [{finding.code}]")

    # Say what came of it.
    if left:
        typer.echo(f"{counted_errors(left)} left that fix does not mend; dfmspec validate shows them", err=True)
    elif not has_changed:
        note("nothing to mend")
    stop_at_faults(faults)
    if left or (diff and has_changed):
        raise typer.Exit(FINDINGS)


class _Mended(NamedTuple):
    """What came of a file."""

    before: str
    after: str
    findings: list[tuple[Diagnostic, list[str]]]
    """The findings that are mended, each with what became of what."""
    errors: int
    """How many remain."""
    faults: list[Diagnostic]
    """What dfmspec itself failed at."""


def _mended(file: str, overrides: Sequence[str], *, unsafe: bool, upgrade: bool) -> _Mended:
    """A file's text with everything mended that can be."""
    before: str | None = None
    text: str | None = None
    mended: list[tuple[Diagnostic, list[str]]] = []
    errors = 0
    faults: list[Diagnostic] = []
    for _ in range(_ROUNDS):
        whole = load_checked(file, overrides, None, _LEVELS, text=text)
        resolved = whole.resolved
        cells = cells_checked(whole, overrides, None, _LEVELS)
        findings = list(dict.fromkeys(chain.from_iterable(found for _, found in cells)))
        document = resolved.spec.documents[0]
        if before is None:
            before = document.text
        asked = [*(_renamed(finding, resolved.spec.target, document) for finding in findings)] if upgrade else findings
        text, now = fixed(document, asked, unsafe=unsafe)
        mended += [(finding, _became(document, finding)) for finding in now]
        if not now:
            _tell_of_moves(finding for finding in asked if finding.fix and finding not in now)
        errors = sum(finding.severity is Severity.ERROR for finding in findings)
        faults = [finding for finding in findings if finding.traceback]
        if not now:
            break
    return _Mended(before or "", text or "", mended, errors, faults)


def _tell_of_moves(findings: Iterable[Diagnostic]) -> None:
    """Keys that would go to another section, and share their lines with others."""
    for finding in findings:
        for edit in finding.fix:
            if edit.kind == "move":
                move = f"{dotted(edit.path)} -> {dotted(edit.value)}"
                note(f"{finding.span}: {move} is made where both sections are blocks with a line for each key")


def _renamed(finding: Diagnostic, target: str, document: Document) -> Diagnostic:
    """A finding of an unknown key, with the edit to its name at the revision that the target's catalogue is of."""
    renames = RENAMES.get((target, TARGETS[target].revision), {})
    if finding.code != "SPC201":
        return finding
    # A section that is not known is one finding, of all its keys.
    moves = []
    for old, new in renames.items():
        path = tuple(old.split("."))
        if path in document.keys and path[: len(finding.path)] == finding.path:
            moves.append(Edit("move", path, tuple(new.split("."))))
    return finding._replace(fix=tuple(moves)) if moves else finding


def _became(document: Document, finding: Diagnostic) -> list[str]:
    """What the edits of a finding make of what stands there: `model.num_layer -> model.num_layers`."""
    lines = []
    for edit in finding.fix:
        key = dotted(edit.path)
        if edit.kind == "rename":
            lines.append(f"{key} -> {dotted((*edit.path[:-1], edit.value))}")
        elif edit.kind == "move":
            lines.append(f"{key} -> {dotted(edit.value)}")
        elif edit.kind == "set":
            lines.append(f"{key}: {_source(document, edit.path)} -> {scalar(edit.value)}")
        else:
            name, value = edit.value
            lines.append(f"{dotted((*edit.path[:-1], name))}: {scalar(value)}, which is new")
    return lines


def _source(document: Document, path: Path_) -> str:
    """A value as it is written."""
    place = document.values[path]
    line = lines_of(document.text)[place.line - 1]
    end = place.end_column - 1 if place.end_line == place.line else None
    return line[place.column - 1 : end].strip()


def _show_difference(file: str, mended: _Mended) -> None:
    """Print what would change, as diff prints it."""
    before = mended.before.splitlines(keepends=True)
    after = mended.after.splitlines(keepends=True)
    lines = difflib.unified_diff(before, after, file, file)
    typer.echo("".join(lines), nl=False)


def _write(file: Path, text: str) -> None:
    """Write a file aside, and rename it; it keeps its mode, and its byte-order mark if it has one."""
    target = file.resolve()
    mark = b""
    if target.read_bytes().startswith(codecs.BOM_UTF8):
        mark = codecs.BOM_UTF8
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(mark + text.encode())
            out.flush()
            os.fsync(out.fileno())
        Path(name).chmod(target.stat().st_mode)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
