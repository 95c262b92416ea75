"""dfmspec validate: every finding of one or more specs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.check.report import REPORTERS, reporter
from dfmspec.cli.arguments import check_format, check_levels, complete_code, complete_override, exists, load_checked, split_words, texts_of
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.errors import FINDINGS, USAGE, UsageError

Found = tuple[list[Diagnostic], dict[str, str], list[str]]
"""Findings, the text of each file, and what could not be read at all."""


def validate(
    words: Annotated[
        list[str], typer.Argument(metavar="SPEC... [KEY=VALUE]...", help="Specs, folders, globs, or - for stdin; and overrides laid over each.",
                                  show_default=False, autocompletion=complete_override),
    ],
    check: Annotated[
        str, typer.Option(help="What to look at: spec (the file alone), paths (files it names), data (samples), deep (the model).", metavar="LEVELS")
    ] = "spec,paths",
    format_: Annotated[str, typer.Option("--format", help=f"How to show findings: {', '.join(REPORTERS)}.", envvar="DFMSPEC_FORMAT")] = "full",
    report: Annotated[list[str] | None, typer.Option(help="Write another form to a file, such as sarif=out.sarif; repeatable.", metavar="FORMAT=PATH")] = None,
    select: Annotated[str | None, typer.Option(help="Only these rules: codes or their beginnings, such as PAR,BAT101.", autocompletion=complete_code)] = None,
    ignore: Annotated[str | None, typer.Option(help="Not these rules.", autocompletion=complete_code)] = None,
    baseline: Annotated[Path | None, typer.Option(help="Findings in this file do not count.")] = None,
    write_baseline: Annotated[Path | None, typer.Option(help="Write what is found into this file, and accept it.")] = None,
    fail_on: Annotated[str, typer.Option(help="The least severity that gives exit code 1: error, warning or hint.")] = "error",
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit code 0 whatever is found.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Processes for many files; 0: one a core.", min=0)] = 1,
    dataset_path: Annotated[str | None, typer.Option(help="Folder of the WebDataset, or a metadataset's .yaml, as the training script takes it.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Check specs and show every finding at once.

    Exit code 0: no errors (warnings and hints may be shown). 1: errors. 2: wrong usage.

    Example: dfmspec validate spec.yaml target=dfm cluster.nproc_per_node=2
    """
    levels, form = check_levels(check), check_format(format_)
    reports = [_report_argument(text) for text in report or ()]
    if fail_on.upper() not in Severity.__members__:
        raise UsageError(f"--fail-on {fail_on}: error, warning or hint")
    chosen, ignored = _codes("--select", select), _codes("--ignore", ignore)
    files, overrides = split_words(words)
    files = expanded(files)
    _refuse_inputs(files, [*(path for _, path in reports), *([write_baseline] if write_baseline else [])])
    findings, texts, unread = _check_all(files, overrides, dataset_path, levels, jobs)
    if chosen or ignored:
        asked = {f.code for f in findings if (not chosen or f.code.startswith(chosen)) and not (ignored and f.code.startswith(ignored))}
        findings = [f for f in findings if f.code in asked or _is_structural(f)]
        if kept := sorted({f.code for f in findings} - asked):
            typer.echo(f"note: {', '.join(kept)} are errors of reading, which --select and --ignore do not leave out", err=True)
    findings = _against_baseline(findings, baseline, write_baseline)
    _show(findings, texts, form, reports, quiet=quiet)
    for message in unread:
        typer.echo(f"error: {message}", err=True)
    if unread:
        raise typer.Exit(USAGE)
    if not exit_zero and any(f.suppression is None and f.severity >= Severity[fail_on.upper()] for f in findings):
        raise typer.Exit(FINDINGS)


def _check_all(files: Sequence[str], overrides: Sequence[str], dataset_path: str | None, levels: Sequence[str], jobs: int) -> Found:
    """Findings and texts of all files, in their order, whatever the number of processes."""
    jobs = min(jobs or os.cpu_count() or 1, max(1, len(files) // 16))
    if jobs == 1:
        parts: Iterable[Found] = [_check(files, overrides, dataset_path, levels)]
    else:
        from concurrent.futures import ProcessPoolExecutor

        size = -(-len(files) // (4 * jobs))
        chunks = [files[start : start + size] for start in range(0, len(files), size)]
        with ProcessPoolExecutor(jobs) as pool:
            parts = list(pool.map(_check, chunks, *([value] * len(chunks) for value in (overrides, dataset_path, levels))))
    findings: dict[Diagnostic, None] = {}  # a fault of a shared base is one finding
    texts: dict[str, str] = {}
    unread: list[str] = []
    for found, read, errors in parts:
        findings |= dict.fromkeys(found)
        texts |= read
        unread += errors
    return list(findings), texts, unread


def _check(files: Sequence[str], overrides: Sequence[str], dataset_path: str | None, levels: Sequence[str]) -> Found:
    findings: list[Diagnostic] = []
    texts: dict[str, str] = {}
    unread: list[str] = []
    for file in files:
        try:
            resolved, found = load_checked(file, overrides, dataset_path, [level for level in levels if level != "deep"], everything=True)
        except UsageError as error:
            unread.append(str(error))
            continue
        findings += found
        texts |= texts_of(resolved)
        if "deep" in levels:
            from dfmspec.cli.deep import deep_findings

            findings += deep_findings(resolved, found)
    return findings, texts, unread


def expanded(names: Sequence[str]) -> list[str]:
    """The files that words name; a folder stands for the YAML files in it, a pattern for what it matches."""
    files: list[str] = []
    for name in names:
        path = Path(name)
        if name == "-":
            files.append("-")
        elif exists(name) and path.is_dir():
            found = [file for file in path.rglob("*") if file.suffix in (".yaml", ".yml") and file.is_file()]
            inside = sorted(str(file) for file in found if not _is_hidden(file.relative_to(path)))
            if not inside:
                raise UsageError(f"{name} holds no .yaml or .yml files")
            files += inside
        elif not exists(name) and any(character in name for character in "*?["):
            import glob

            matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  the pattern may be absolute
            if not matches:
                raise UsageError(f"{name} matches no file")
            files += expanded(matches)
        else:
            files.append(name)
    if not files:
        raise UsageError("name at least one spec")
    return list({os.path.normpath(file): file for file in reversed(files)}.values())[::-1]


def _refuse_inputs(files: Sequence[str], outputs: Sequence[Path]) -> None:
    """Raises:
    UsageError: a file that is to be written is one of those that are checked.
    """
    inputs = {os.path.realpath(file) for file in files}
    if taken := [path for path in outputs if os.path.realpath(path) in inputs]:
        raise UsageError(f"{taken[0]} is one of the specs, and nothing of yours is overwritten; name another file")


def _is_structural(finding: Diagnostic) -> bool:
    """Whether the finding is an error of reading: such a spec says nothing certain, so it cannot be left out or accepted."""
    from dfmspec.check.rules import RULES

    return finding.severity is Severity.ERROR and any(rule.code == finding.code and rule.level == "load" for rule in RULES)


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _codes(option: str, text: str | None) -> tuple[str, ...]:
    """`PAR,BAT101` as beginnings of codes, each of which there is."""
    from dfmspec.check.rules import RULES

    codes = tuple(word.strip().upper() for word in (text or "").split(",") if word.strip())
    if unknown := [code for code in codes if not any(rule.code.startswith(code) for rule in RULES)]:
        raise UsageError(f"{option} {unknown[0]}: there is no rule of that code; dfmspec rule lists them")
    return codes


def _report_argument(text: str) -> tuple[str, Path]:
    form, equals, name = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--report {text}: write FORMAT=PATH, such as sarif=out.sarif")
    return check_format(form), Path(name)


def _against_baseline(findings: list[Diagnostic], baseline: Path | None, write: Path | None) -> list[Diagnostic]:
    if write is not None:
        from dfmspec.check.baseline import write_baseline

        write_baseline([finding for finding in findings if not _is_structural(finding)], write)
        baseline = write
    if baseline is not None:
        from dfmspec.check.baseline import apply_baseline

        return apply_baseline(findings, baseline)
    return findings


def _show(findings: Sequence[Diagnostic], texts: dict[str, str], form: str, reports: Sequence[tuple[str, Path]], *, quiet: bool) -> None:
    """On stdout first: a report that cannot be written hides nothing."""
    if text := reporter(form)([finding for finding in findings if not quiet or finding.severity is Severity.ERROR], texts):
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    for name, file in reports:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(re.sub(r"\x1b\[\d*m", "", reporter(name)(findings, texts)) + "\n", encoding="utf-8")
    if (summary := os.environ.get("GITHUB_STEP_SUMMARY")) and form == "github":
        with Path(summary).open("a", encoding="utf-8") as handle:
            handle.write(reporter("markdown")(findings, texts) + "\n")
