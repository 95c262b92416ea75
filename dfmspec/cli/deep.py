"""`--check deep`: what Megatron itself says of a spec, asked in another process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

import typer

from dfmspec.cli.arguments import require_trainer
from dfmspec.diagnostics import Diagnostic, Severity, Span, shown
from dfmspec.errors import PreflightError
from dfmspec.read.resolve import Resolved
from dfmspec.targets import DEFAULT_TARGET, target_module

CODE, NAME = "RUN201", "megatron-refuses"


def deep_findings(resolved: Resolved, findings: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Megatron's refusal as a finding; nothing for a spec that has errors already, or that another target trains.

    Raises:
        PreflightError: the train extra is not installed, or the check itself failed.
    """
    target = target_module(resolved.spec.target)
    reason = "" if target.OWN else f"it is for target {DEFAULT_TARGET}"
    if any(finding.severity is Severity.ERROR for finding in shown(findings)):
        reason = "the spec has errors already"
    if reason:
        typer.echo(f"{resolved.spec.file}: not checked with Megatron's own objects: {reason}", err=True)
        return []
    require_trainer()
    config = target.config(resolved.values)
    done = subprocess.run([sys.executable, "-P", "-m", "dfmspec.trainer.commands.deep"], input=json.dumps(config), capture_output=True, text=True, check=False)
    if done.returncode:
        raise PreflightError(f"the deep check failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    for note in answer["notes"]:
        typer.echo(f"{resolved.spec.file}: {note}", err=True)
    out = []
    for refusal in answer["refusals"]:
        key = _mentioned(refusal["message"], resolved) or "model"
        origin = resolved.origins.get(key)
        span = origin.span if origin is not None and origin.is_users else Span(resolved.spec.file)
        message = f"Megatron refuses this on {refusal['stage']}: {' '.join(refusal['message'].split())[:300]}"
        out.append(Diagnostic(span, CODE, NAME, Severity.ERROR, message, f"raised at {refusal['place']}", tuple(key.split("."))))
    return out


def _mentioned(message: str, resolved: Resolved) -> str | None:
    """The key whose name stands in Megatron's words, one of the user's first."""
    words = set(re.findall(r"\w+", message))
    named = [key for key in resolved.values if key.rpartition(".")[2] in words and "." in key]
    return next((key for key in named if resolved.origins[key].is_users), named[0] if named else None)
