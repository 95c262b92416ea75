"""dfmspec validate: every finding of one or more specs."""

from __future__ import annotations

from typing import Annotated

import typer

from dfmspec.cli.arguments import check_format, check_levels, load_checked, split_words, texts_of
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.errors import FINDINGS, UsageError
from dfmspec.report import REPORTERS, reporter


def validate(
    words: Annotated[list[str], typer.Argument(metavar="SPEC... [KEY=VALUE]...", help="Specs, and overrides laid over each.", show_default=False)],
    check: Annotated[str, typer.Option(help="What to look at: spec (the file alone), paths (files it names).", metavar="LEVELS")] = "spec,paths",
    format_: Annotated[str, typer.Option("--format", help=f"How to show findings: {', '.join(REPORTERS)}.")] = "full",
    dataset_path: Annotated[str | None, typer.Option(help="Folder of the WebDataset, as the training script takes it.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Check specs and show every finding at once.

    Exit code 0: no errors (warnings and hints may be shown). 1: errors. 2: wrong usage.

    Example: dfmspec validate spec.yaml target=dfm cluster.nproc_per_node=2
    """
    levels, form = check_levels(check), check_format(format_)
    files, overrides = split_words(words)
    if not files:
        raise UsageError("name at least one spec")
    findings: list[Diagnostic] = []
    texts: dict[str, str] = {}
    for file in files:
        resolved, found = load_checked(file, overrides, dataset_path, levels)
        findings += [finding for finding in found if not quiet or finding.severity is Severity.ERROR]
        texts |= texts_of(resolved)
    shown = reporter(form)(findings, texts)
    if shown:
        typer.echo(shown)
    if any(finding.severity is Severity.ERROR for finding in findings):
        raise typer.Exit(FINDINGS)
