"""What several commands share: words of the command line, and loading a spec with its findings shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import typer

from dfmspec.check.report import REPORTERS, reporter
from dfmspec.check.rules import LEVELS, all_findings, check_spec
from dfmspec.diagnostics import Diagnostic, Severity
from dfmspec.errors import InvalidSpec, UsageError
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Positional words as (files, key=value overrides); a file that has an `=` in its name wins."""
    files = [word for word in words if exists(word) or ("=" not in word and word[:1] not in "~+")]
    return files, [word for word in words if word not in files]


def exists(word: str) -> bool:
    """Whether a word names a file or folder."""
    try:
        return Path(word).exists()
    except OSError:  # longer than a file name can be
        return False


def one_file(words: Sequence[str]) -> tuple[str, list[str]]:
    """Exactly one file and overrides."""
    files, overrides = split_words(words)
    if len(files) != 1:
        raise UsageError(f"give one spec, then key=value overrides; got {len(files)} files: {', '.join(files) or 'none'}")
    return files[0], overrides


def load_checked(
    file: str, overrides: Sequence[str], dataset_path: str | None, levels: Sequence[str], *, everything: bool = False, text: str | None = None
) -> tuple[Resolved, tuple[Diagnostic, ...]]:
    """A spec (or - for stdin), resolved, with its findings; everything: the suppressed ones too; text: instead of what the file holds.

    Raises:
        UsageError: the file cannot be read, or an override is not key=value.
    """
    try:
        if Path(file).is_dir():
            raise UsageError(f"{file} is a folder; name a YAML file in it")
        resolved = resolve_spec(load_spec(file, overrides, dataset_path=dataset_path, text=text))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}") from error
    return resolved, (all_findings if everything else check_spec)(resolved, levels=levels)


def texts_of(resolved: Resolved) -> dict[str, str]:
    """The text of each file that a spec was made of."""
    return {document.file: document.text for document in resolved.spec.documents}


def require_valid(resolved: Resolved, findings: Sequence[Diagnostic]) -> None:
    """Show what matters on stderr; stop at errors.

    Raises:
        InvalidSpec: there are errors.
    """
    shown = [finding for finding in findings if finding.severity >= Severity.WARNING]
    if shown:
        typer.echo(reporter("full")(shown, texts_of(resolved)), err=True)
    errors = sum(finding.severity is Severity.ERROR for finding in shown)
    if errors:
        raise InvalidSpec(f"{resolved.spec.file} has {errors} error{'s' if errors > 1 else ''}; nothing was started")


def check_levels(text: str) -> tuple[str, ...]:
    """`--check spec,paths`."""
    levels = tuple(word.strip() for word in text.split(",") if word.strip())
    known = (*LEVELS, "deep")
    if not levels:
        raise UsageError(f"--check needs a level: {', '.join(known)}")
    if unknown := [level for level in levels if level not in known]:
        raise UsageError(f"--check {unknown[0]}: known levels are {', '.join(known)}")
    return levels


def check_format(name: str, known: Sequence[str] = tuple(REPORTERS)) -> str:
    """`--format NAME`."""
    if name not in known:
        raise UsageError(f"--format {name}: known formats are {', '.join(known)}")
    return name


def complete_override(incomplete: str) -> list[str]:
    """Keys for the shell's completion, section by section; files complete by themselves."""
    from dfmspec.targets import TARGETS, catalogue

    keys = sorted({key for target in TARGETS for key, _ in catalogue(target).defaults()})
    if "." not in incomplete:
        import glob

        files = glob.glob(f"{glob.escape(incomplete)}*")  # noqa: PTH207  names as they were begun
        return files + [name for name in sorted({f"{key.partition('.')[0]}." if "." in key else f"{key}=" for key in keys}) if name.startswith(incomplete)]
    return [f"{key}=" for key in keys if key.startswith(incomplete)]


def complete_key(incomplete: str) -> list[str]:
    """Keys, without the equals sign of an override."""
    return [name.removesuffix("=") for name in complete_override(incomplete)]


def complete_code(incomplete: str) -> list[tuple[str, str]]:
    """Codes of rules, with their names."""
    from dfmspec.check.rules import RULES

    return [(rule.code, rule.name) for rule in RULES if rule.code.startswith(incomplete.upper())]


def trainer_module(module: str, *args: str, quiet: bool = False) -> int:
    """Run `python -m dfmspec.trainer.<module>`: torch code is always another process. Returns its exit code.

    quiet: what it prints as data is dropped, since it is not this command's.

    Raises:
        PreflightError: the train extra is not installed.
    """
    import subprocess

    from dfmspec.processes import left_to_parent

    require_trainer()
    command = [sys.executable, "-P", "-m", f"dfmspec.trainer.{module}", *args]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL if quiet else None, preexec_fn=left_to_parent) as process:  # noqa: PLW1509 (one thread here)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # until it has removed what is half made
            process.kill()
            raise


def require_trainer() -> None:
    """Raises:
    PreflightError: the train extra is not installed.
    """
    import importlib.util

    from dfmspec.errors import PreflightError

    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("megatron") is None:
        raise PreflightError("this needs the trainer's packages; run: pip install 'dfmspec[train]'")
