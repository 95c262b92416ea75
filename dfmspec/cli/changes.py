"""What a branch has changed: findings that there were not at another revision of git."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dfmspec.check.baseline import marked
from dfmspec.cli.arguments import cells_checked, load_checked
from dfmspec.diagnostics import Diagnostic
from dfmspec.errors import UsageError


def marked_since(
    revision: str,
    findings: Sequence[Diagnostic],
    files: Sequence[str],
    overrides: Sequence[str],
    dataset_path: str | None,
    levels: Sequence[str],
) -> list[Diagnostic]:
    """The findings, those marked that there were at the revision already: of the specs and all they build on, as then.

    Args:
        revision: of git, such as origin/main.
        findings: of today.
        files: the specs.
        overrides: laid over each.
        dataset_path: the value of --dataset-path.
        levels: what is looked at; samples are today's in any case.

    Raises:
        UsageError: there is no such revision, or no repository.
    """
    _require(revision)
    before: Counter[tuple[str, str]] = Counter()
    looked_at = [level for level in levels if level != "deep"]
    for file in files:
        if file == "-":
            continue
        for finding in _found_at(revision, file, overrides, dataset_path, looked_at):
            before[_key(finding)] += 1
    return marked(findings, before, _key)


def _found_at(
    revision: str, file: str, overrides: Sequence[str], dataset_path: str | None, levels: Sequence[str]
) -> list[Diagnostic]:
    """The findings of a spec as it was at a revision; none where it was not there."""
    text = _text_at(revision, file)
    if text is None:
        return []
    # What it builds on is what it built on then; which files those are, the texts themselves say.
    then: dict[str, str] = {}
    unknown: set[str] = set()
    while True:
        whole = load_checked(file, overrides, dataset_path, levels, text=text, texts=then)
        named = [_place_of(problem) for problem in whole.resolved.spec.problems if problem.code == "SPC104"]
        built_on = [document.file for document in whole.resolved.spec.documents[1:]]
        files = {os.path.realpath(place) for place in (*built_on, *named) if place and not place.startswith("<")}
        before = {place: _text_at(revision, place) for place in files - then.keys() - unknown}
        unknown |= before.keys()
        found_then = {place: old for place, old in before.items() if old is not None}
        if not found_then:
            break
        then.update(found_then)  # one that git does not know is taken as it is today
    found: dict[Diagnostic, None] = {}
    for _, findings in cells_checked(whole, overrides, dataset_path, levels, texts=then):
        found.update(dict.fromkeys(findings))
    return list(found)


def _place_of(problem: Diagnostic) -> str:
    """The file that a spec builds on and that cannot be read today, such as one that was renamed since."""
    return problem.message.partition(": ")[2].partition(" cannot be read")[0]


def _key(finding: Diagnostic) -> tuple[str, str]:
    return os.path.normpath(finding.span.file), finding.fingerprint


def _require(revision: str) -> None:
    done = _git(["rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"], Path.cwd())
    if _git(["rev-parse", "--is-inside-work-tree"], Path.cwd()) is None:
        raise UsageError(f"--diff-base {revision}: this is no working tree of git")
    if done is None:
        raise UsageError(
            f"--diff-base {revision}: git knows no such revision here; fetch it with its history, or name another"
        )


def _text_at(revision: str, file: str) -> str | None:
    """What a file held at a revision; None where it was not there."""
    place = Path(file).resolve()
    return _git(["show", f"{revision}:./{place.name}"], place.parent)


def _git(words: Sequence[str], folder: Path) -> str | None:
    """What git prints; None where it fails."""
    # In a hook, git names its own repository to those that it starts.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *words], cwd=folder, env=env, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="surrogateescape")
