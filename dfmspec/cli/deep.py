"""`--check deep`: what Megatron itself says of a spec, asked in another process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import typer

from dfmspec.cli.arguments import require_trainer
from dfmspec.diagnostics import Diagnostic, Severity, Span, not_suppressed
from dfmspec.errors import PreflightError
from dfmspec.read.resolve import Resolved
from dfmspec.targets import DEFAULT_TARGET, target_module

CODE = "RUN201"
NAME = "megatron-refuses"


def deep_findings(resolved: Resolved, findings: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Megatron's refusal as a finding; nothing for a spec that has errors already, or that another target trains.

    Raises:
        PreflightError: the train extra is not installed, or the check itself failed.
    """
    reason = _reason_not_to(resolved, findings)
    if reason:
        typer.echo(f"{resolved.spec.file}: not checked with Megatron's own objects: {reason}", err=True)
        return []
    require_trainer()
    answer = _asked(resolved)
    for note in answer["notes"]:
        typer.echo(f"{resolved.spec.file}: {note}", err=True)
    return [_finding(refusal, resolved) for refusal in answer["refusals"]]


def _reason_not_to(resolved: Resolved, findings: Sequence[Diagnostic]) -> str:
    """Why Megatron is not asked; "" when it is."""
    if any(finding.severity is Severity.ERROR for finding in not_suppressed(findings)):
        return "the spec has errors already"
    if not target_module(resolved.spec.target).OWN:
        return f"it is for target {DEFAULT_TARGET}"
    return ""


def _asked(resolved: Resolved) -> dict[str, Any]:
    """The answer of a process that builds Megatron's objects.

    It has `notes`, which are texts, and `refusals`, each with stage, message and place.
    """
    config = target_module(resolved.spec.target).config(resolved.values)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dfmspec.trainer.commands.deep"],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise PreflightError(f"the deep check failed: {lines[-1]}")
    # The last line: libraries print before it.
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _finding(refusal: dict[str, str], resolved: Resolved) -> Diagnostic:
    """A refusal, at the user's key that Megatron's words name."""
    key = _mentioned(refusal["message"], resolved) or "model"
    origin = resolved.origins.get(key)
    span = Span(resolved.spec.file)
    if origin is not None and origin.is_set_by_user:
        span = origin.span
    words = " ".join(refusal["message"].split())
    return Diagnostic(
        span,
        CODE,
        NAME,
        Severity.ERROR,
        f"Megatron refuses this on {refusal['stage']}: {words[:300]}",
        f"raised at {refusal['place']}",
        tuple(key.split(".")),
    )


def _mentioned(message: str, resolved: Resolved) -> str | None:
    """The key whose name stands in Megatron's words, one of the user's first."""
    words = set(re.findall(r"\w+", message))
    mentioned = []
    for key in resolved.values:
        section, _, name = key.rpartition(".")
        if section and name in words:
            mentioned.append(key)
    users = [key for key in mentioned if resolved.origins[key].is_set_by_user]
    return next(iter(users or mentioned), None)
