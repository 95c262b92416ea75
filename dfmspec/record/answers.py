"""What a node found before it started anything, and what it lacked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.record.files import read_json
from dfmspec.record.manifest import Failure, Manifest
from dfmspec.record.run_dir import AttemptDir

CONFIGURATION = "configuration"
"""The kind of failure that no second attempt mends."""


def told(fault: Mapping[str, str]) -> str:
    """A fault in a sentence: place, what is, what is needed, one way out."""
    return f"{fault['place']}: {fault['is']}; needed: {fault['needed']}; {fault['way_out']}"


def failure_of(attempt_dir: AttemptDir) -> Failure | None:
    """What the first node that lacked something lacked; None: none did."""
    for node, path in attempt_dir.answers():
        try:
            message = "; ".join(told(fault) for fault in read_json(path)["faults"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if message:
            return Failure(node=node, rank=-1, error_type=CONFIGURATION, message=message)
    return None


def record_answers(manifest: Manifest, attempt_dir: AttemptDir) -> None:
    """Write down what the first node found."""
    for _, path in attempt_dir.answers():
        try:
            record_answer(manifest, read_json(path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return


def record_answer(manifest: Manifest, answer: Mapping[str, Any]) -> None:
    """Write down the versions and revisions that an interpreter has."""
    if answer:
        found = {name: answer[name] for name in ("interpreter", "python", "versions", "sources")}
        manifest.environment = {**manifest.environment, "training": found}
