"""dfmspec validate: every finding of one or more specs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from dfmspec.check.report import REPORTERS, reporter
from dfmspec.cli.arguments import (
    DatasetPath,
    ProfileOption,
    cells_checked,
    check_format,
    check_levels,
    complete_code,
    complete_override,
    exists,
    load_checked,
    split_words,
    stop_at_faults,
    texts_of,
)
from dfmspec.cli.voice import detail, is_quiet, note
from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed
from dfmspec.errors import FINDINGS, OK, USAGE, UsageError
from dfmspec.figures import counted
from dfmspec.files import write_named

_FORMATS = ", ".join(REPORTERS)

_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC... [KEY=VALUE]...",
        help="Specs, folders, globs, or - for stdin; and overrides laid over each.",
        show_default=False,
        autocompletion=complete_override,
    ),
]
_Check = Annotated[
    str,
    typer.Option(
        help="What to look at: spec (the file alone), paths (files it names), data (samples), deep (the model).",
        metavar="LEVELS",
    ),
]
_Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help=f"How to show findings: {_FORMATS}. By itself full, or github in an action of GitHub's.",
        envvar="DFMSPEC_FORMAT",
    ),
]
_Report = Annotated[
    list[str] | None,
    typer.Option(
        help="Write another form to a file, such as sarif=out.sarif; repeatable.",
        metavar="FORMAT=PATH",
    ),
]
_Select = Annotated[
    str | None,
    typer.Option(
        help="Only these rules: codes or their beginnings, such as PAR,BAT101.",
        autocompletion=complete_code,
    ),
]
_Ignore = Annotated[
    str | None,
    typer.Option(help="Not these rules.", autocompletion=complete_code),
]
_Baseline = Annotated[
    Path | None,
    typer.Option(help="Findings in this file do not count."),
]
_WriteBaseline = Annotated[
    Path | None,
    typer.Option(help="Write what is found into this file, and accept it."),
]
_Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out files of folders and patterns: a name, or a path, with * and ?; repeatable.", metavar="PATTERN"
    ),
]
_ForceExclude = Annotated[
    bool,
    typer.Option("--force-exclude", help="Leave out files that are named, too: for hooks, which name each file."),
]
_DiffBase = Annotated[
    str | None,
    typer.Option(help="Count only what was not found at this revision of git, such as origin/main.", metavar="REF"),
]
_FailOn = Annotated[
    str,
    typer.Option(help="The least severity that gives exit code 1: error, warning or hint."),
]
_ExitZero = Annotated[
    bool,
    typer.Option("--exit-zero", help="Exit code 0 whatever is found."),
]
_Jobs = Annotated[
    int,
    typer.Option("--jobs", "-j", help="Processes for many files; 0: one a core.", min=0),
]
_Hints = Annotated[
    bool,
    typer.Option("--hints", help="Show hints too, in the forms for people, rather than count them."),
]


def validate(
    words: _Words,
    check: _Check = "spec,paths",
    format_: _Format = None,
    report: _Report = None,
    select: _Select = None,
    ignore: _Ignore = None,
    exclude: _Exclude = None,
    force_exclude: _ForceExclude = False,
    baseline: _Baseline = None,
    write_baseline: _WriteBaseline = None,
    diff_base: _DiffBase = None,
    fail_on: _FailOn = "error",
    exit_zero: _ExitZero = False,
    jobs: _Jobs = 0,
    dataset_path: DatasetPath = None,
    profile: ProfileOption = None,
    hints: _Hints = False,
) -> None:
    """Check specs and show every finding at once.

    Exit code 0: no errors (warnings and hints may be shown). 1: errors. 2: wrong usage.

    Example: dfmspec validate spec.yaml target=dfm cluster.nproc_per_node=2
    """
    # What is asked for, and whether it can be done.
    levels = check_levels(check)
    form, reports = _forms(format_, report or ())
    least = _severity(fail_on)
    chosen = _codes("--select", select)
    ignored = _codes("--ignore", ignore)
    names, overrides = split_words(words, profile)
    files = _without_excluded(names, exclude or (), forced=force_exclude)
    if not files:
        note("nothing to check: every file is excluded")
        return
    outputs = [*(path for _, path in reports), *filter(None, [write_baseline])]
    _refuse_inputs(files, outputs)
    # The findings, less those that do not count.
    checked = _check_all(files, overrides, dataset_path, levels, jobs)
    _refuse_inputs(list(checked.texts), outputs)
    findings = _chosen(checked.findings, chosen, ignored)
    findings = _against_baseline(findings, baseline, write_baseline)
    if diff_base is not None:
        from dfmspec.cli.changes import marked_since

        findings = marked_since(diff_base, findings, files, overrides, dataset_path, levels)
    # Hints that count, or that are asked for by name, are shown.
    hints = hints or least is Severity.HINT or bool(chosen)
    _show(findings, checked.texts, form, reports, hints=hints)
    detail(f"read: {', '.join(checked.texts)}; at levels {', '.join(levels)}")
    if not checked.unread:
        _tell_of_success(files, findings, hints=hints, of_all=not (chosen or ignored))
    for message in checked.unread:
        typer.echo(f"error: {message}", err=True)

    # The exit code.
    stop_at_faults(checked.findings)
    raise typer.Exit(USAGE if checked.unread else _code_of(findings, least, exit_zero=exit_zero))


def _code_of(findings: Sequence[Diagnostic], least: Severity, *, exit_zero: bool) -> int:
    """The exit code that findings give."""
    counts = any(finding.severity >= least for finding in not_suppressed(findings))
    return FINDINGS if counts and not exit_zero else OK


def _tell_of_success(files: Sequence[str], findings: Sequence[Diagnostic], *, hints: bool, of_all: bool) -> None:
    """Say on stderr that nothing was found, or nothing but hints that are not shown."""
    from dfmspec.check.rules import RULES

    counted_findings = not_suppressed(findings)
    if any(finding.severity > Severity.HINT for finding in counted_findings) or (hints and counted_findings):
        return
    what = files[0] if len(files) == 1 else counted(len(files), "spec")
    found = f"no findings ({len(RULES)} rules)" if of_all else "no findings of the rules that were asked"
    known = len(findings) - len(counted_findings)
    if known:
        found = f"no new findings, and {known} that are accepted or were known before"
    if counted_findings:
        found = f"no errors, {counted(len(counted_findings), 'hint')} (--hints shows them)"
    note(f"{what}: {found}")


def _forms(format_: str | None, report: Sequence[str]) -> tuple[str, list[tuple[str, Path]]]:
    """The form for stdout, and those for files; by themselves those that the CI around us takes.

    Raises:
        UsageError: one is not known.
    """
    form = check_format(format_ or _usual_format())
    reports = [_report_argument(text) for text in report]
    if not format_ and not reports and os.environ.get("GITLAB_CI"):
        reports = [("gitlab", Path(_CODE_QUALITY))]
    return form, reports


def _severity(name: str) -> Severity:
    """The severity of --fail-on.

    Raises:
        UsageError: there is none of that name.
    """
    if name.upper() not in Severity.__members__:
        raise UsageError(f"--fail-on {name}: error, warning or hint")
    return Severity[name.upper()]


class _Checked(NamedTuple):
    """What came of some files."""

    findings: list[Diagnostic]
    texts: dict[str, str]
    """The text of each file that was read."""
    unread: list[str]
    """What could not be read at all, and why."""


def _chosen(
    findings: list[Diagnostic],
    chosen: tuple[str, ...],
    ignored: tuple[str, ...],
) -> list[Diagnostic]:
    """The findings that --select and --ignore leave; an error of reading stays, with a note."""
    if not chosen and not ignored:
        return findings
    codes = {finding.code for finding in findings}
    asked = {code for code in codes if _is_asked(code, chosen, ignored)}
    left = [finding for finding in findings if finding.code in asked or _always_counts(finding)]
    kept = sorted({finding.code for finding in left} - asked)
    if kept:
        listed = ", ".join(kept)
        typer.echo(
            f"note: {listed} are of reading or of the site's policy, which --select and --ignore do not leave out",
            err=True,
        )
    return left


def _is_asked(code: str, chosen: tuple[str, ...], ignored: tuple[str, ...]) -> bool:
    """Whether a code is among the chosen ones, or none is chosen, and not among the ignored ones."""
    is_chosen = not chosen or code.startswith(chosen)
    return is_chosen and not code.startswith(ignored)


def _check_all(
    files: Sequence[str],
    overrides: Sequence[str],
    dataset_path: str | None,
    levels: Sequence[str],
    jobs: int,
) -> _Checked:
    """Findings and texts of all files, in their order, whatever the number of processes."""
    # A process is worth its start from 16 files on.
    jobs = min(jobs or os.cpu_count() or 1, max(1, len(files) // 16))
    if jobs == 1:
        parts: Iterable[_Checked] = [_check(files, overrides, dataset_path, levels)]
    else:
        from concurrent.futures import ProcessPoolExecutor

        size = -(-len(files) // (4 * jobs))
        chunks = [files[start : start + size] for start in range(0, len(files), size)]
        work = partial(_check, overrides=overrides, dataset_path=dataset_path, levels=levels)
        with ProcessPoolExecutor(jobs) as pool:
            parts = list(pool.map(work, chunks))

    # A fault of a shared base is one finding.
    findings: dict[Diagnostic, None] = {}
    texts: dict[str, str] = {}
    unread: list[str] = []
    for part in parts:
        findings.update(dict.fromkeys(part.findings))
        texts.update(part.texts)
        unread += part.unread
    return _Checked(list(findings), texts, unread)


def _check(
    files: Sequence[str],
    overrides: Sequence[str],
    dataset_path: str | None,
    levels: Sequence[str],
) -> _Checked:
    """Findings and texts of some files."""
    findings: list[Diagnostic] = []
    texts: dict[str, str] = {}
    unread: list[str] = []
    own_levels = [level for level in levels if level != "deep"]
    for file in files:
        try:
            whole = load_checked(file, overrides, dataset_path, own_levels, everything=True)
        except UsageError as error:
            unread.append(str(error))
            continue
        for resolved, found in cells_checked(whole, overrides, dataset_path, own_levels, everything=True):
            findings += found
            texts.update(texts_of(resolved))
            if "deep" in levels:
                from dfmspec.cli.deep import deep_findings

                findings += deep_findings(resolved, found)
    return _Checked(findings, texts, unread)


def expanded(names: Sequence[str]) -> list[str]:
    """The files that words name; a folder stands for the YAML files in it, a pattern for what it matches.

    Raises:
        UsageError: a folder or a pattern stands for nothing, or there are no words.
    """
    files: list[str] = []
    for name in names:
        is_there = name != "-" and exists(name)
        is_pattern = any(character in name for character in "*?[")
        if is_there and Path(name).is_dir():
            files += _yaml_files(name)
        elif name != "-" and not is_there and is_pattern:
            files += _matches(name)
        else:
            files.append(name)
    if not files:
        raise UsageError("name at least one spec")

    # A file that is named twice is checked once, at its last place, under its first name.
    once: dict[str, str] = {}
    for file in reversed(files):
        once[os.path.normpath(file)] = file
    return list(once.values())[::-1]


_CODE_QUALITY = "gl-code-quality-report.json"
"""Where a job of GitLab's looks for findings, by the name that its own documentation gives."""


def _usual_format() -> str:
    """The form where none is asked for: annotations in an action of GitHub's."""
    return "github" if os.environ.get("GITHUB_ACTIONS") == "true" else "full"


def _add_to_code_quality(file: Path, issues: list[dict[str, object]]) -> None:
    """Add findings to the report of a job of GitLab's, which other tools of the job may have begun."""
    others: list[dict[str, object]] = []
    with suppress(OSError, ValueError):
        others = [issue for issue in json.loads(file.read_text()) if isinstance(issue, dict)]
    known = {issue.get("fingerprint") for issue in issues}
    kept = [issue for issue in others if issue.get("fingerprint") not in known]
    write_named(file, json.dumps([*kept, *issues], indent=1) + "\n")
    note(f"{file}: {counted(len(issues), 'finding')} for GitLab's page of the merge request")


def _without_excluded(names: Sequence[str], patterns: Sequence[str], *, forced: bool) -> list[str]:
    """The files that words name, less those that are excluded; one that is named itself only by force."""
    files = expanded(names)
    if not patterns:
        return files
    named = set() if forced else {os.path.normpath(name) for name in names}
    kept = [file for file in files if os.path.normpath(file) in named or not _is_excluded(file, patterns)]
    if not kept and not forced:
        raise UsageError(f"--exclude leaves nothing of {' '.join(names)}")
    return kept


def _is_excluded(file: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches a file, a folder above it, or the name of one of them."""
    from fnmatch import fnmatchcase

    path = Path(os.path.normpath(file))
    places = [path, *path.parents]
    for pattern in patterns:
        wanted = pattern.removeprefix("./").rstrip("/")
        if any(fnmatchcase(place.as_posix(), wanted) or fnmatchcase(place.name, wanted) for place in places):
            return True
    return False


def _yaml_files(name: str) -> list[str]:
    """The YAML files in a folder and its folders, less the hidden ones, and those of bundles and runs."""
    folder = Path(name)
    if _is_written(folder):
        raise UsageError(f"{name} is a bundle or a run, which a spec gives; name the spec")
    files = []
    for file in folder.rglob("*"):
        is_yaml = file.suffix in (".yaml", ".yml") and file.is_file()
        if is_yaml and not _is_hidden(file.relative_to(folder)) and not any(map(_is_written, file.parents)):
            files.append(str(file))
    if not files:
        raise UsageError(f"{name} holds no .yaml or .yml files")
    return sorted(files)


@lru_cache(maxsize=4096)
def _is_written(folder: Path) -> bool:
    """Whether a folder is a bundle or a run directory, whose files nobody edits."""
    return (folder / "plan.json").is_file()


def _is_hidden(file: Path) -> bool:
    """Whether a file, or a folder above it, begins with a point."""
    return any(part.startswith(".") for part in file.parts)


def _matches(pattern: str) -> list[str]:
    """The files that a pattern matches."""
    import glob

    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  the pattern may be absolute
    if not found:
        raise UsageError(f"{pattern} matches no file")
    return expanded(found)


def _refuse_inputs(files: Sequence[str], outputs: Sequence[Path]) -> None:
    """Stop where a file of the user's would be overwritten.

    Raises:
        UsageError: a file that is to be written is one of those that are checked.
    """
    inputs = {os.path.realpath(file) for file in files}
    for path in outputs:
        if os.path.realpath(path) in inputs:
            raise UsageError(f"{path} is a part of the specs, and nothing of yours is overwritten; name another file")


def _always_counts(finding: Diagnostic) -> bool:
    """Whether the finding can be neither left out nor accepted: an error of reading, or one of the site's policy.

    A spec that was not read says nothing certain.
    """
    return finding.is_of_the_site or (finding.severity is Severity.ERROR and finding.code in _codes_of_reading())


@lru_cache
def _codes_of_reading() -> frozenset[str]:
    """The codes that are given out while a spec is read."""
    from dfmspec.check.rules import RULES

    return frozenset(rule.code for rule in RULES if rule.level in ("load", "fault"))


def _codes(option: str, text: str | None) -> tuple[str, ...]:
    """`PAR,BAT101` as beginnings of codes, each of which there is.

    Raises:
        UsageError: no code begins with one of them.
    """
    from dfmspec.check.rules import RULES

    words = [word.strip().upper() for word in (text or "").split(",")]
    beginnings = tuple(word for word in words if word)
    for beginning in beginnings:
        if not any(rule.code.startswith(beginning) for rule in RULES):
            raise UsageError(f"{option} {beginning}: there is no rule of that code; dfmspec rule lists them")
    return beginnings


def _report_argument(text: str) -> tuple[str, Path]:
    """The format and the file of `--report FORMAT=PATH`."""
    form, equals, name = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--report {text}: write FORMAT=PATH, such as sarif=out.sarif")
    return check_format(form), Path(name)


def _against_baseline(
    findings: list[Diagnostic],
    baseline: Path | None,
    write: Path | None,
) -> list[Diagnostic]:
    """The findings, with those of a baseline suppressed, which is written first if that is asked for."""
    if write is not None:
        from dfmspec.check.baseline import write_baseline

        accepted = [finding for finding in findings if not _always_counts(finding)]
        left = len(findings) - len(accepted)
        if left:
            note(
                f"{counted(left, 'finding')} of reading or of the site's policy cannot be accepted: "
                "without what stands there the rest is not certain"
            )
        write_baseline(accepted, write)
        baseline = write
    if baseline is None:
        return findings

    from dfmspec.check.baseline import apply_baseline

    return apply_baseline(findings, baseline)


def _show(
    findings: Sequence[Diagnostic],
    texts: dict[str, str],
    form: str,
    reports: Sequence[tuple[str, Path]],
    *,
    hints: bool,
) -> None:
    """Report the findings on stdout, into the files that are asked for, and to GitHub."""
    # On stdout first: a report that cannot be written hides nothing.
    printed = findings
    if is_quiet() and form in ("full", "concise"):
        printed = [finding for finding in findings if finding.severity is Severity.ERROR]
    if form == "full":
        from dfmspec.check.report.text import report

        text = report(printed, texts, hints=hints)
    else:
        text = reporter(form)(printed, texts)
    if text:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    # Into files, which have no colours; the name of a file may have bytes that are no text.
    for name, file in reports:
        if file == Path(_CODE_QUALITY):
            _add_to_code_quality(file, json.loads(reporter(name)(findings, texts)))
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        text = reporter(name)(findings, texts)
        plain = re.sub(r"\x1b\[\d*m", "", text)
        write_named(file, plain + "\n")

    # The page of a job on GitHub.
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and form == "github":
        text = reporter("markdown")(findings, texts)
        with Path(summary).open("a", encoding="utf-8", errors="backslashreplace") as handle:
            handle.write(text + "\n")
