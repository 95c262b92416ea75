"""The chain of a run, from its spec to its checkpoints: each link has the digest of the one before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfmspec.data.fingerprint import fingerprint
from dfmspec.errors import StalePlanError, UsageError
from dfmspec.plan.plan import code_digest
from dfmspec.record import bridge_checkpoints
from dfmspec.record.checkpoints import manifest_digest, problem, read_manifest
from dfmspec.record.files import read_whole
from dfmspec.record.manifest import CheckpointRecord, Manifest
from dfmspec.record.run_dir import PATCH, RunDir
from dfmspec.run.bundle import read_plan
from dfmspec.spec.digest import bytes_digest, config_digest
from dfmspec.targets import CONFIG, DEFAULT_TARGET, target_module

HOLDS = "holds"
DIFFERS = "differs"
GONE = "gone"
UNKNOWN = "unknown"
_BROKEN = (DIFFERS, GONE)


class Link(NamedTuple):
    """One link, and how it stands."""

    name: str
    state: str
    """"holds", "differs", "gone", or "unknown" where the record does not say."""
    said: str = ""
    is_of_the_run: bool = True
    """Whether the run is broken without it, rather than the machine another one."""

    @property
    def is_broken(self) -> bool:
        """Whether the chain ends here."""
        return self.is_of_the_run and self.state in _BROKEN


def chain(run: RunDir, manifest: Manifest, *, deep: bool = False) -> list[Link]:
    """Every link of a run, from the spec to the last checkpoint.

    Args:
        run: its directory.
        manifest: its record.
        deep: whether shards are read, where the record has the digest of their content.
    """
    return [
        _text("spec.yaml", run.spec, manifest.spec_digest),
        _patch(run, manifest),
        _plan(run, manifest),
        _config(run, manifest),
        _code(manifest),
        _data(manifest, deep=deep),
        *_checkpoints(run, manifest),
    ]


def _text(name: str, file: Path, digest: str | None) -> Link:
    """A file of the run against a digest of its record."""
    if digest is None:
        return Link(name, UNKNOWN, "the record has no digest of it")
    found = _read(file)
    if found is None:
        return Link(name, GONE, f"{file} cannot be read")
    is_same = bytes_digest(found) == digest
    return Link(name, HOLDS if is_same else DIFFERS, "" if is_same else f"{file} is not what the record was made of")


def _read(file: Path) -> bytes | None:
    try:
        return read_whole(file)
    except (OSError, ValueError):
        return None


def _patch(run: RunDir, manifest: Manifest) -> Link:
    git = manifest.git or {}
    if "patch_digest" in git:
        return _text(PATCH, run.patch, git["patch_digest"])
    if not git:
        return Link("git", UNKNOWN, "the spec was in no repository")
    if git.get("dirty"):
        return Link("git", UNKNOWN, f"{git['commit'][:12]}, with changes that nobody kept (run.git patch keeps them)")
    return Link("git", HOLDS, str(git["commit"])[:12])


def _plan(run: RunDir, manifest: Manifest) -> Link:
    """The plan, which has the digest of its own content, and is the record's."""
    try:
        plan = read_plan(run.plan)
    except UsageError as error:
        return Link("plan.json", GONE, str(error))
    except StalePlanError as error:
        return Link("plan.json", DIFFERS, str(error))
    if plan.recorded_id != manifest.plan_id:
        return Link("plan.json", DIFFERS, f"{run.plan} is another plan than the record's")
    return Link("plan.json", HOLDS, plan.short_id)


def _config(run: RunDir, manifest: Manifest) -> Link:
    """What the ranks read; an earlier version's record has the digest of the plan's own configuration."""
    file = run.path / CONFIG
    found = _read(file)
    if found is None:
        return Link(CONFIG, GONE, f"{file} cannot be read")
    if manifest.config_digest in (_digest_of(found), _digest_of_plan(run)):
        return Link(CONFIG, HOLDS)
    return Link(CONFIG, DIFFERS, f"{file} is not the configuration of the record")


def _digest_of(config: bytes) -> str | None:
    try:
        return config_digest(yaml.safe_load(config))
    except (yaml.YAMLError, TypeError, ValueError):
        return None


def _digest_of_plan(run: RunDir) -> str | None:
    try:
        return config_digest(read_plan(run.plan).config)
    except (UsageError, StalePlanError):
        return None


def _code(manifest: Manifest) -> Link:
    """dfmspec's own code, which may have gone on since."""
    recorded = manifest.guards.get("code")
    if recorded is None:
        return Link("code", UNKNOWN, "the record has no digest of it", is_of_the_run=False)
    version = manifest.code.get("version", "")
    if recorded == code_digest():
        return Link("code", HOLDS, version)
    return Link("code", DIFFERS, f"the run had dfmspec {version} of other files than here", is_of_the_run=False)


def _data(manifest: Manifest, *, deep: bool) -> Link:
    """The shards as they were at the start; the run stands without them, and cannot be made again."""
    recorded = manifest.data
    if recorded is None:
        return Link("data", UNKNOWN, "the record has no fingerprint", is_of_the_run=False)
    reads_all = deep and "content" in recorded
    found = fingerprint(Path(recorded["path"]), deep=reads_all)
    if found is None:
        return Link("data", GONE, f"{recorded['path']} is not here", is_of_the_run=False)
    counted = f"{found['shards']} shards, {found['bytes']:,} bytes"
    wrong = [name for name in ("sizes", "content") if name in found and found[name] != recorded.get(name)]
    if wrong:
        return Link("data", DIFFERS, f"{recorded['path']} has other {wrong[0]}: {counted}", is_of_the_run=False)
    by = "name, size and content" if reads_all else "name and size"
    return Link("data", HOLDS, f"{counted}, by {by}")


def _checkpoints(run: RunDir, manifest: Manifest) -> Iterator[Link]:
    """The checkpoints that the record names: whole, of this plan and of this configuration."""
    own = target_module(_target(run)).OWN
    of_one: Callable[[CheckpointRecord, Manifest], Link] = _own_checkpoint if own else _scripts_checkpoint
    last = max((checkpoint.iteration for checkpoint in manifest.checkpoints), default=0)
    for checkpoint in manifest.checkpoints:
        if not Path(checkpoint.path).exists() and checkpoint.iteration != last:
            yield Link(f"checkpoint {checkpoint.iteration}", UNKNOWN, "it made room for later ones")
            continue
        yield of_one(checkpoint, manifest)


def _target(run: RunDir) -> str:
    try:
        return read_plan(run.plan).target
    except (UsageError, StalePlanError):
        return DEFAULT_TARGET


def _own_checkpoint(checkpoint: CheckpointRecord, manifest: Manifest) -> Link:
    name = f"checkpoint {checkpoint.iteration}"
    folder = Path(checkpoint.path)
    try:
        digest = manifest_digest(folder)
    except OSError as error:
        return Link(name, GONE, str(error))
    if digest != checkpoint.manifest_digest:
        return Link(name, DIFFERS, f"{folder} is not the one that the run committed")
    fault = problem(folder)
    if fault:
        return Link(name, DIFFERS, f"{folder}: {fault}")
    stored: dict[str, Any] = read_manifest(folder)
    theirs = {"plan_id": manifest.plan_id, "config_digest": manifest.config_digest, "run_id": manifest.run_id}
    # An earlier version wrote fewer of them, or the digest of another writing of the configuration.
    if "run_id" not in stored:
        theirs = {"plan_id": manifest.plan_id}
    other = [key for key, value in theirs.items() if stored.get(key) not in (None, value)]
    if other:
        return Link(name, DIFFERS, f"{folder} has another {other[0]} than the run")
    return Link(name, HOLDS, f"{len(stored['files'])} files by size and checksum")


def _scripts_checkpoint(checkpoint: CheckpointRecord, manifest: Manifest) -> Link:
    fault = bridge_checkpoints.problem(Path(checkpoint.path))
    name = f"checkpoint {checkpoint.iteration}"
    if fault:
        return Link(name, DIFFERS, f"{checkpoint.path}: {fault}")
    return Link(name, HOLDS, "whole by its files' lengths; it has no checksums")
