"""What several commands share: words of the command line, and loading a spec with its findings shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from dfmspec.check.policy import policy_findings
from dfmspec.check.report import REPORTERS
from dfmspec.check.rules import LEVELS, all_findings
from dfmspec.cli.voice import detail, is_quiet
from dfmspec.diagnostics import Diagnostic, Severity, not_suppressed
from dfmspec.errors import InternalError, InvalidSpec, UsageError
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.targets import DEFAULT_TARGET

DatasetPath = Annotated[
    str | None,
    typer.Option(help="Folder of the WebDataset, or a metadataset's .yaml, as the training script takes it."),
]
"""--dataset-path."""


if TYPE_CHECKING:
    from dfmspec.read.matrix import Cell
    from dfmspec.record.manifest import Manifest
    from dfmspec.record.run_dir import RunDir

CellOption = Annotated[
    str | None,
    typer.Option("--cell", help="Of a spec with a matrix: this cell alone, by its name or number.", metavar="CELL"),
]
"""--cell."""


def complete_profile(incomplete: str) -> list[tuple[str, str]]:
    """Names of profiles, with whose they are."""
    from dfmspec.read.sites import known_profiles, places

    found = dict(known_profiles(places(".")))
    return [(name, f"of the {whose}") for name, whose in found.items() if name.startswith(incomplete)]


ProfileOption = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        help="A profile that lies under the spec, in place of those that it names; may be given again.",
        metavar="NAME",
        autocompletion=complete_profile,
    ),
]
"""--profile."""


class Checked(NamedTuple):
    """A configuration, and what was found in it."""

    resolved: Resolved
    findings: tuple[Diagnostic, ...]


def complete_run(incomplete: str) -> list[tuple[str, str]]:
    """Names of experiments that have runs in the folder `runs`, and the ids of the runs."""
    names: dict[str, str] = {}
    for run in sorted(Path("runs").glob("*/*/manifest.json"), reverse=True):
        names.setdefault(run.parts[1], "its latest run")
        if run.parts[2] != "latest":
            names[run.parts[2]] = f"a run of {run.parts[1]}"
    return [(name, what) for name, what in names.items() if name.startswith(incomplete)]


RunArgument = Annotated[
    str,
    typer.Argument(
        help="A run directory, a run id, or an experiment's name (its latest run).",
        autocompletion=complete_run,
    ),
]
RunsFolder = Annotated[
    Path,
    typer.Option(help="Folder of the run directories."),
]
TEXT_OR_JSON = ("text", "json")
TextOrJson = Annotated[
    str,
    typer.Option("--format", help="text or json."),
]


def record_of(run: RunDir) -> Manifest:
    """The record of a run.

    Raises:
        CheckpointError: it cannot be read.
    """
    from dfmspec.errors import CheckpointError
    from dfmspec.record.manifest import read_manifest

    try:
        return read_manifest(run)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the record of run {run} cannot be read: {str(error).splitlines()[0]}") from error


def split_words(words: Sequence[str], profiles: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Positional words as (files, key=value overrides); a file that has an `=` in its name wins.

    The profiles of --profile are the first override.

    Raises:
        UsageError: one of them has no name.
    """
    files = []
    for word in words:
        is_override = "=" in word or word[:1] in ("", "~", "+")
        if not is_override or exists(word):
            files.append(word)
    overrides = [word for word in words if word not in files]
    if profiles:
        if not all(name.strip() for name in profiles):
            raise UsageError("--profile is empty; name a profile, or leave it out")
        overrides.insert(0, f"profile={','.join(profiles)}")
    return files, overrides


def exists(word: str) -> bool:
    """Whether a word names a file or folder."""
    try:
        return Path(word).exists()
    except OSError:  # longer than a file name can be
        return False


def one_file(words: Sequence[str], profiles: Sequence[str] | None = None) -> tuple[str, list[str]]:
    """Exactly one file, and overrides.

    Raises:
        UsageError: there are several files, or none.
    """
    files, overrides = split_words(words, profiles)
    if len(files) != 1:
        named = ", ".join(files) or "none"
        raise UsageError(f"give one spec, then key=value overrides; got {len(files)} files: {named}")
    return files[0], overrides


def named_folder(place: Path, what: str) -> Path:
    """A folder that is named itself, or by a run's name or id, as `dfmspec show` takes it.

    Args:
        place: what is named.
        what: what a folder may be here, for a message.

    Raises:
        UsageError: it is neither.
    """
    if place.is_dir():
        return place
    if not place.exists():
        from dfmspec.record.runs import find_run

        with suppress(UsageError):
            return find_run(str(place), Path("runs")).path
    raise UsageError(f"{place} is not a folder; name {what}, or a run by its name or id")


def load_checked(
    file: str,
    overrides: Sequence[str],
    dataset_path: str | None,
    levels: Sequence[str],
    *,
    everything: bool = False,
    text: str | None = None,
    cell: Cell | None = None,
    texts: Mapping[str, str] | None = None,
    policy: bool = True,
) -> Checked:
    """A spec (or - for stdin), resolved, with its findings.

    Args:
        file: the spec.
        overrides: `key=value`.
        dataset_path: the value of --dataset-path.
        levels: what a check may look at.
        everything: with the findings that a comment suppresses.
        text: instead of what the file holds.
        cell: of its matrix.
        texts: instead of what files that it builds on hold, by their real paths.
        policy: with what the site's policy says of it.

    Raises:
        UsageError: the file cannot be read, or an override is not key=value.
    """
    try:
        if text is None and Path(file).is_dir():
            raise UsageError(f"{file} is a folder; name a YAML file in it")
        spec = load_spec(file, overrides, dataset_path=dataset_path, text=text, cell=cell, texts=texts)
        resolved = resolve_spec(spec)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    findings = all_findings(resolved, levels=levels, site=policy_findings(resolved) if policy else ())
    return Checked(resolved, findings if everything else not_suppressed(findings))


def cells_checked(
    whole: Checked,
    overrides: Sequence[str],
    dataset_path: str | None,
    levels: Sequence[str],
    *,
    everything: bool = False,
    texts: Mapping[str, str] | None = None,
) -> list[Checked]:
    """Each cell of a spec's matrix, or the spec itself where it has none, resolved, with its findings."""
    spec = whole.resolved.spec
    text = spec.documents[0].text if spec.documents else None
    found = []
    for cell in spec.cells:
        one = load_checked(
            spec.file, overrides, dataset_path, levels, everything=everything, text=text, cell=cell, texts=texts
        )
        found.append(one)
    return found or [whole]


def of_cell(
    whole: Checked,
    name: str | None,
    overrides: Sequence[str],
    dataset_path: str | None,
    levels: Sequence[str],
    *,
    everything: bool = False,
) -> Checked:
    """The cell that is asked for, resolved, with its findings; or the spec itself, where it has no matrix.

    Raises:
        UsageError: there is none of that name, or there are several and none was named.
    """
    cell = _one_cell(whole, name)
    if cell is None:
        return whole
    spec = whole.resolved.spec
    text = spec.documents[0].text
    return load_checked(spec.file, overrides, dataset_path, levels, everything=everything, text=text, cell=cell)


def _one_cell(whole: Checked, name: str | None) -> Cell | None:
    """The cell that is asked for; None: the spec has no matrix.

    Raises:
        UsageError: it has none of that name, or there are several and none was named.
    """
    spec = whole.resolved.spec
    if name is None and not spec.cells:
        return None
    listed = "; ".join(f"{number} {cell.name}" for number, cell in enumerate(spec.cells[:_LISTED_CELLS], 1))
    more = ", ..." if len(spec.cells) > _LISTED_CELLS else ""
    if name is None:
        raise UsageError(f"{spec.file} has {len(spec.cells)} cells; name one with --cell: {listed}{more}")
    if not spec.cells:
        raise UsageError(f"--cell {name}: {spec.file} has no matrix")
    from dfmspec.read.matrix import chosen

    cell = chosen(spec.cells, name)
    if cell is None:
        raise UsageError(f"--cell {name}: {spec.file} has no such cell; its cells are {listed}{more}")
    return cell


_LISTED_CELLS = 8
"""How many cells a message names."""


def texts_of(resolved: Resolved) -> dict[str, str]:
    """The text of each file that a spec was made of."""
    return {document.file: document.text for document in resolved.spec.documents}


def stop_at_faults(findings: Sequence[Diagnostic]) -> None:
    """End with what dfmspec itself failed at, after everything else was shown.

    Raises:
        InternalError: a rule or a derivation failed; a file for a report is written.
    """
    tracebacks = dict.fromkeys(finding.traceback for finding in findings if finding.traceback)
    if tracebacks:
        from dfmspec.cli.faults import told

        raise InternalError(told("\n".join(tracebacks)))


def require_valid(*checked: Checked) -> None:
    """Show what matters in a spec, or in all cells of one, on stderr; stop at errors.

    Raises:
        InternalError: a rule failed.
        InvalidSpec: there are errors.
    """
    texts: dict[str, str] = {}
    for resolved, _ in checked:
        texts.update(texts_of(resolved))
    findings = list(dict.fromkeys(finding for _, found in checked for finding in not_suppressed(found)))
    least = Severity.ERROR if is_quiet() else Severity.WARNING
    grave = [finding for finding in findings if finding.severity >= least]
    if grave:
        from dfmspec.check.report.text import report

        typer.echo(report(grave, texts, stream=sys.stderr), err=True)
    stop_at_faults(findings)
    errors = [finding for finding in grave if finding.severity is Severity.ERROR]
    if errors:
        wrong = dict.fromkeys(
            resolved.spec.file for resolved, found in checked if not {*errors}.isdisjoint(not_suppressed(found))
        )
        have = "has" if len(wrong) == 1 else "have"
        raise InvalidSpec(f"{', '.join(wrong)} {have} {counted_errors(len(errors))}; nothing was started")


def counted_errors(number: int) -> str:
    """`1 error`, or `2 errors`."""
    return f"{number} errors" if number > 1 else f"{number} error"


def check_levels(text: str) -> tuple[str, ...]:
    """The levels of `--check spec,paths`.

    Raises:
        UsageError: there is none, or one is not known.
    """
    words = [word.strip() for word in text.split(",")]
    levels = tuple(word for word in words if word)
    known = (*LEVELS, "deep")
    listed = ", ".join(known)
    if not levels:
        raise UsageError(f"--check needs a level: {listed}")
    for level in levels:
        if level not in known:
            raise UsageError(f"--check {level}: known levels are {listed}")
    return levels


def check_format(name: str, known: Sequence[str] = tuple(REPORTERS)) -> str:
    """The format of `--format NAME`.

    Raises:
        UsageError: it is not known.
    """
    if name not in known:
        listed = ", ".join(known)
        raise UsageError(f"--format {name}: known formats are {listed}")
    return name


# What the shell offers. Only here are catalogues and rules needed, so they are imported when it asks.


def complete_override(ctx: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Keys of the spec's target for the shell's completion, section by section, then values; files by themselves."""
    words = [*(ctx.params.get("words") or ()), *args]
    target = _target_of(words)
    key, equals, begun = incomplete.partition("=")
    if equals:
        return [f"{key}={value}" for value in _values_of(key, target) if value.startswith(begun)]
    keys = keys_of_targets(target)
    if "." in incomplete:
        return [f"{key}=" for key in keys if key.startswith(incomplete)]
    import glob

    files = glob.glob(f"{glob.escape(incomplete)}*")  # noqa: PTH207  names as they were begun
    names = sorted({_beginning(key) for key in keys})
    return files + [name for name in names if name.startswith(incomplete)]


def _target_of(words: Sequence[str]) -> str | None:
    """The target of a command line: of an override, or of a line of the spec; None: nothing says."""
    import re

    from dfmspec.targets import TARGETS, unpinned

    for word in reversed(words):
        if word.startswith("target="):
            return unpinned(word.removeprefix("target="))[0]
    for word in words:
        with suppress(OSError, UnicodeDecodeError):
            found = re.search(r"^target: *([\w@.]+)", Path(word).read_text(), re.MULTILINE)
            target = unpinned(found[1])[0] if found else DEFAULT_TARGET
            return target if target in TARGETS else None
    return None


def _values_of(key: str, target: str | None) -> list[str]:
    """The values that a key may have, where those are a few words."""
    from dfmspec.targets import TARGETS, catalogue

    values: dict[str, None] = {}
    for each in TARGETS if target is None else (target,):
        field = catalogue(each).field(key) or {}
        declared = field.get("type", ())
        if "boolean" in ((declared,) if isinstance(declared, str) else declared):
            values.update(dict.fromkeys(("true", "false")))
        values.update(dict.fromkeys(str(value) for value in field.get("enum", ()) if value is not None))
    return list(values)


def keys_of_targets(target: str | None = None) -> list[str]:
    """Every key that a target has, or (None) some target, sorted."""
    from dfmspec.targets import TARGETS, catalogue

    keys: set[str] = set()
    for each in TARGETS if target not in TARGETS else (target,):
        keys.update(key for key, _ in catalogue(str(each)).defaults())
    return sorted(keys)


def _beginning(key: str) -> str:
    """What the shell offers first: `section.`, or `key=` for a key without a section."""
    section, dot, _ = key.partition(".")
    return f"{section}." if dot else f"{key}="


def complete_key(incomplete: str) -> list[str]:
    """Keys, without the equals sign of an override."""
    keys = keys_of_targets()
    if "." in incomplete:
        return [key for key in keys if key.startswith(incomplete)]
    names = sorted({_beginning(key).removesuffix("=") for key in keys})
    return [name for name in names if name.startswith(incomplete)]


def complete_target(incomplete: str) -> list[str]:
    """Targets."""
    from dfmspec.targets import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def complete_code(incomplete: str) -> list[tuple[str, str]]:
    """Codes of rules, with their names."""
    from dfmspec.check.rules import RULES

    return [(rule.code, rule.name) for rule in RULES if rule.code.startswith(incomplete.upper())]


def trainer_module(module: str, *args: str, quiet: bool = False) -> int:
    """Run `python -m dfmspec.trainer.<module>`: torch code is always another process. Returns its exit code.

    Args:
        module: the module under dfmspec.trainer.
        args: its arguments.
        quiet: what it prints as data is dropped, since it is not this command's.

    Raises:
        PreflightError: the train extra is not installed.
    """
    import subprocess

    from dfmspec.processes import left_to_parent

    require_trainer()
    command = [sys.executable, "-P", "-m", f"dfmspec.trainer.{module}", *args]
    stdout = subprocess.DEVNULL if quiet else None
    detail("starts: " + " ".join(command))
    process = subprocess.Popen(command, stdout=stdout, preexec_fn=left_to_parent)  # noqa: PLW1509  one thread here
    with process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # It leaves Ctrl-C to this process; to remove what is half made may take a while.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()
            raise


def require_trainer() -> None:
    """Stop where the trainer's packages are not installed.

    Raises:
        PreflightError: the train extra is not installed.
    """
    import importlib.util

    from dfmspec.errors import PreflightError

    for package in ("torch", "megatron"):
        if importlib.util.find_spec(package) is None:
            raise PreflightError("this needs the trainer's packages; run: pip install 'dfmspec[train]'")
