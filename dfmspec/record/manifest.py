"""The manifest of a run: what was asked, what ran where, what came of it.

It is whole at every moment: each new one is written aside, then renamed.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dfmspec import __version__
from dfmspec.files import write_aside
from dfmspec.record.files import read_json
from dfmspec.record.run_dir import RunDir
from dfmspec.redaction import known_here, without_secrets

_PACKAGES = ("dfmspec", "torch", "megatron-core", "megatron-energon", "transformer-engine", "webdataset", "numpy")


def finite(value: float | None) -> float | None:
    """A number that JSON has; null for any other."""
    return value if value is not None and math.isfinite(value) else None


_Measured = Annotated[float | None, AfterValidator(finite)]
"""A figure, or null where there is none."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Failure(_Record):
    """The first rank that failed, and why."""

    node: int
    rank: int
    error_type: str
    message: str
    traceback: str = ""


class NodeProcess(_Record):
    """torchrun on one node."""

    node: int
    host: str
    argv: list[str]
    env: list[str]
    """Names of the variables that dfmspec set; values only of those in the plan."""
    exit_code: int | None = None
    """null while it runs; negative: killed by that signal."""


class Attempt(_Record):
    """One start of the run, from launch to exit."""

    number: int
    started: str
    ended: str | None = None
    nodes: list[NodeProcess]
    from_iteration: int | None = None
    to_iteration: int | None = None
    start_seconds: dict[str, float] | None = None
    """Of rank 0: seconds of each stage of the start, and of the first iteration, with what it compiles."""
    outcome: Literal["running", "finished", "stopped", "failed"] = "running"
    signal: int | None = None
    """The signal that stopped it, if one did."""
    failure: Failure | None = None


class CheckpointRecord(_Record):
    """A committed checkpoint."""

    iteration: int
    path: str
    manifest_digest: str


class Metrics(_Record):
    """Of the last attempt."""

    first_loss: _Measured = None
    final_loss: _Measured = None
    """Mean of the last tenth of the iterations, at least one and at most a hundred."""
    eval_loss: _Measured = None
    tokens_per_second: _Measured = None
    """Median over the iterations, padding left out."""
    padding: _Measured = None
    """Share of the packs that was padding, over all iterations."""
    seconds_per_iteration: _Measured = None
    """Median over the iterations."""


class Manifest(_Record):
    """The record of one run."""

    format_version: Literal[1] = 1
    run_id: str
    name: str
    group: str | None = None
    """Runs that belong together, such as the cells of a matrix."""
    plan_id: str
    spec_file: str | None
    spec_digest: str | None
    config_digest: str
    overrides: list[str]
    guards: dict[str, str]
    resumed_from: str | None = None
    """The iteration or folder that `run.resume` named; null for auto, require and never."""
    begins_anew: bool = False
    """`run.resume` was never: a tracker that others left where the run saves says nothing of it."""
    starts_from: dict[str, Any] = Field(default_factory=dict)
    """The keys of section `checkpoint` by which the run starts there."""
    created: str
    git: dict[str, Any] | None
    (
        "Of the spec's repository: commit, branch, remote, whether the working tree differed (null: git took too long "
        "to tell) and in which files, submodules, and under run.git patch the file of what differed with its digest; "
        "null outside a repository."
    )
    code: dict[str, Any] = Field(default_factory=dict)
    """dfmspec's own version, and the commit of its checkout, where it is one."""
    data: dict[str, Any] | None = None
    """The dataset at the start: its place, and number, bytes and a digest of names and sizes of its shards."""
    environment: dict[str, Any]
    """Python, packages, host, processors, GPUs."""
    attempts: list[Attempt] = Field(default_factory=list)
    checkpoints: list[CheckpointRecord] = Field(default_factory=list)
    metrics: Metrics = Field(default_factory=Metrics)
    artifacts: list[str] = Field(default_factory=list)
    """Pictures and reports, relative to the run directory."""
    verdict: Literal["running", "succeeded", "stopped", "failed"] = "running"
    """succeeded: the target iteration was reached and the last checkpoint is whole."""
    reason: str = ""


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema of manifest.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://dfmspec.dev/schemas/{__version__}/manifest.schema.json",
        **Manifest.model_json_schema(),
    }


def now() -> str:
    """This moment, as RFC 3339, UTC."""
    return moment(time.time())


def moment(seconds: float) -> str:
    """A moment in seconds since the epoch, as RFC 3339, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def write_manifest(run: RunDir, manifest: Manifest) -> None:
    """Replace manifest.json, atomically."""
    text = json.dumps(without_secrets(manifest.model_dump(), known_here()), indent=2, allow_nan=False)
    write_aside(run.manifest, f"{text}\n")


def read_manifest(run: RunDir) -> Manifest:
    """The manifest of a run directory.

    Raises:
        OSError, ValueError: it is absent or damaged.
    """
    # Not model_validate_json, which wants UTF-8: paths need not be that.
    return Manifest.model_validate(read_json(run.manifest))


def launch_host() -> dict[str, Any]:
    """What the launch host is, without importing torch."""
    packages = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "packages": packages,
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, str]]:
    """Each GPU of the machine as nvidia-smi has it: name, uuid, memory.total, driver_version."""
    if not shutil.which("nvidia-smi"):
        return []
    fields = ("name", "uuid", "memory.total", "driver_version")
    query = ",".join(fields)
    text = _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]) or ""
    found = []
    for line in text.splitlines():
        words = [word.strip() for word in line.split(",")]

        # Warnings may stand among the lines.
        if len(words) == len(fields):
            found.append(dict(zip(fields, words, strict=True)))
    return found


def _output(argv: list[str]) -> str | None:
    """What a program prints; None when it is not there, fails, or takes over five seconds."""
    try:
        result = subprocess.run(argv, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout
