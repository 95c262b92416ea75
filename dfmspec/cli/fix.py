"""dfmspec fix: mend in a spec what can only have been meant otherwise."""

from __future__ import annotations

import codecs
import difflib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import complete_override, load_checked, split_words
from dfmspec.cli.validate import expanded
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.errors import FINDINGS, UsageError
from dfmspec.read.document import Document
from dfmspec.read.fixes import fixed

_ROUNDS = 5
"""One mended fault may uncover another."""


def fix(
    words: Annotated[
        list[str], typer.Argument(metavar="SPEC... [KEY=VALUE]...", help="Specs to mend, and overrides under which to look.",
                                  show_default=False, autocompletion=complete_override),
    ],
    diff: Annotated[bool, typer.Option("--diff", help="Show what would change, and change nothing; exit code 1 if anything would.")] = False,
    unsafe: Annotated[bool, typer.Option("--unsafe", help="Also what may change the meaning, such as the nearest batch size that works.")] = False,
) -> None:
    """Mend names, quoted numbers and stale copies in place; comments and layout stay as they are.

    Example: dfmspec fix --diff specs/
    """
    files, overrides = split_words(words)
    changed, left = False, 0
    for file in expanded(files):
        if file == "-":
            raise UsageError("fix works on files; stdin has no place to write to")
        text, before, mended, errors = _mended(file, overrides, unsafe)
        left += errors
        if text == before:
            continue
        changed = True
        if diff:
            typer.echo("".join(difflib.unified_diff(before.splitlines(keepends=True), text.splitlines(keepends=True), file, file)), nl=False)
        else:
            _write(Path(file), text)
            for finding in mended:
                typer.echo(f"{finding.span}: mended: {finding.message} [{finding.code}]", err=True)
    if left:
        typer.echo(f"{left} error{'s' if left > 1 else ''} left that fix does not mend; dfmspec validate shows them", err=True)
    elif not changed:
        typer.echo("nothing to mend", err=True)
    if diff and changed:
        raise typer.Exit(FINDINGS)


def _mended(file: str, overrides: Sequence[str], unsafe: bool) -> tuple[str, str, list[Diagnostic], int]:
    """(text after, text before, what was mended, errors that remain)."""
    text, before, mended, errors = "", None, [], 0
    for _ in range(_ROUNDS):
        resolved, findings = load_checked(file, overrides, None, ("spec",), text=text if before is not None else None)
        document: Document = resolved.spec.documents[0]
        before = document.text if before is None else before
        text, now = fixed(document, findings, unsafe=unsafe)
        mended += now
        errors = sum(finding.severity is Severity.ERROR for finding in findings)
        if not now:
            break
    return text, before or "", mended, errors


def _write(file: Path, text: str) -> None:
    """Aside, then renamed; the file keeps its mode, and its byte-order mark if it has one."""
    target = file.resolve()
    mark = codecs.BOM_UTF8 if target.read_bytes().startswith(codecs.BOM_UTF8) else b""
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
