"""A run's record in the forms of others: SLSA provenance (an in-toto statement), and a Process Run Crate (RO-Crate).

https://slsa.dev/spec/v1.0/provenance, https://w3id.org/ro/wfrun/process/0.5
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dfmspec import __version__
from dfmspec.errors import DataError
from dfmspec.record.manifest import CheckpointRecord, Manifest
from dfmspec.record.run_dir import RunDir
from dfmspec.spec.checkpoints import MANIFEST
from dfmspec.spec.digest import bytes_digest

Entity = dict[str, Any]

HOME = "https://dfmspec.dev"
_BUILD_TYPE = f"{HOME}/run/v1"
_FILES = {
    "spec.yaml": "The spec of the run.",
    "source.patch": "What was not committed.",
    "plan.json": "What the spec was compiled to.",
    "config.yaml": "What the ranks read.",
    "manifest.json": "The record of the run.",
    "events.jsonl": "What rank 0 told while it trained.",
}
_ENDED = {
    "succeeded": "http://schema.org/CompletedActionStatus",
    "failed": "http://schema.org/FailedActionStatus",
    "stopped": "http://schema.org/FailedActionStatus",
    "running": "http://schema.org/ActiveActionStatus",
}


def slsa(run: RunDir, manifest: Manifest) -> Entity:
    """An in-toto statement with SLSA's provenance: the last checkpoint, and what it was made from.

    Raises:
        DataError: the run has committed nothing.
    """
    last = _last_checkpoint(run, manifest)
    started, finished = _times(manifest)
    external: Entity = {"overrides": manifest.overrides}
    if manifest.spec_file is not None:
        external["spec"] = manifest.spec_file
    if manifest.spec_digest is not None:
        external["specDigest"] = manifest.spec_digest
    metadata = {"invocationId": manifest.run_id, "startedOn": started, "finishedOn": finished}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": _named(run, last), "digest": {"sha256": _hex(last.manifest_digest)}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": external,
                "internalParameters": {"planId": manifest.plan_id, "configDigest": manifest.config_digest},
                "resolvedDependencies": list(_dependencies(manifest)),
            },
            "runDetails": {
                "builder": {"id": f"{HOME}/builder", "version": {"dfmspec": manifest.code.get("version", __version__)}},
                "metadata": {name: value for name, value in metadata.items() if value is not None},
                "byproducts": [
                    {"name": name, "digest": {"sha256": _file_hex(run.path / name)}}
                    for name in _FILES
                    if (run.path / name).is_file()
                ],
            },
        },
    }


def _last_checkpoint(run: RunDir, manifest: Manifest) -> CheckpointRecord:
    if not manifest.checkpoints:
        raise DataError(f"run {run} has committed no checkpoint, so there is nothing whose provenance could be told")
    return max(manifest.checkpoints, key=lambda checkpoint: checkpoint.iteration)


def _named(run: RunDir, checkpoint: CheckpointRecord) -> str:
    """The manifest of a checkpoint, as seen from the run; it has the sizes and checksums of all files."""
    place = Path(checkpoint.path)
    inside = place.relative_to(run.path) if place.is_relative_to(run.path) else place
    return f"{inside.as_posix()}/{MANIFEST}"


def _times(manifest: Manifest) -> tuple[str, str | None]:
    """When the first attempt began, and when the last one ended."""
    if not manifest.attempts:
        return manifest.created, None
    return manifest.attempts[0].started, manifest.attempts[-1].ended


def _dependencies(manifest: Manifest) -> Iterator[Entity]:
    """The spec's repository, its submodules, dfmspec's own, the data, the image, the packages."""
    git = manifest.git or {}
    if git:
        address = git.get("remote") or "file:."
        yield {"uri": f"git+{address}", "digest": {"gitCommit": git["commit"]}, "name": "spec"}
        for path, commit in (git.get("submodules") or {}).items():
            yield {"name": path, "digest": {"gitCommit": commit}}
    if "commit" in manifest.code:
        yield {"name": "dfmspec", "digest": {"gitCommit": manifest.code["commit"]}}
    if manifest.data is not None:
        place = quote(str(manifest.data["path"]))
        counted = {key: manifest.data[key] for key in ("shards", "bytes")}
        yield {
            "uri": f"file://{place}",
            "name": "data: names and sizes of its shards",
            "digest": {"sha256": _hex(manifest.data["sizes"])},
            "annotations": counted,
        }
    if "container" in manifest.guards:
        yield {"name": "image", "digest": {"sha256": _hex(manifest.guards["container"])}}
    for name, version in manifest.environment.get("packages", {}).items():
        yield {"uri": f"pkg:pypi/{name}@{quote(str(version))}", "name": name}


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _file_hex(file: Path) -> str:
    return _hex(bytes_digest(file.read_bytes()))


# RO-Crate.


def ro_crate(run: RunDir, manifest: Manifest) -> Entity:
    """The content of ro-crate-metadata.json: the run directory as a Process Run Crate."""
    started, finished = _times(manifest)
    parts = [_file_entity(run, name) for name in _FILES if (run.path / name).is_file()]
    results = [_checkpoint_entity(run, checkpoint) for checkpoint in manifest.checkpoints]
    results = [result for result in results if (run.path / str(result["@id"])).is_dir()]
    inputs = [part for part in parts if part["@id"] in ("spec.yaml", "source.patch")]
    inputs += list(_data_entity(manifest))
    action: Entity = {
        "@id": f"#{manifest.run_id}",
        "@type": "CreateAction",
        "name": f"Run {manifest.run_id} of {manifest.name}",
        "description": manifest.reason or manifest.verdict,
        "instrument": {"@id": "#dfmspec"},
        "object": [{"@id": each["@id"]} for each in inputs],
        "result": [{"@id": each["@id"]} for each in results],
        "startTime": started,
        "actionStatus": {"@id": _ENDED[manifest.verdict]},
    }
    if finished is not None:
        action["endTime"] = finished
    packages = manifest.environment.get("packages", {})
    root: Entity = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"{manifest.name}, run {manifest.run_id}",
        "description": f"A training run of dfmspec: {manifest.reason or manifest.verdict}",
        "datePublished": finished or started,
        "license": "The terms of this run are its owner's; dfmspec claims none.",
        "conformsTo": {"@id": "https://w3id.org/ro/wfrun/process/0.5"},
        "hasPart": [{"@id": each["@id"]} for each in (*parts, *results)],
        "mentions": [{"@id": action["@id"]}],
    }
    software = {
        "@id": "#dfmspec",
        "@type": "SoftwareApplication",
        "name": "dfmspec",
        "url": HOME,
        "softwareVersion": manifest.code.get("version", __version__),
        "softwareRequirements": [f"{name} {version}" for name, version in packages.items()],
    }
    profile = {
        "@id": "https://w3id.org/ro/wfrun/process/0.5",
        "@type": "CreativeWork",
        "name": "Process Run Crate",
        "version": "0.5",
    }
    descriptor = {
        "@id": "ro-crate-metadata.json",
        "@type": "CreativeWork",
        "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        "about": {"@id": "./"},
    }
    others = [each for each in inputs if each not in parts]
    return {
        "@context": "https://w3id.org/ro/crate/1.1/context",
        "@graph": [descriptor, root, profile, software, action, *parts, *results, *others],
    }


def _file_entity(run: RunDir, name: str) -> Entity:
    file = run.path / name
    forms = {".json": "application/json", ".yaml": "application/yaml", ".jsonl": "application/jsonl"}
    return {
        "@id": name,
        "@type": "File",
        "name": name,
        "description": _FILES[name],
        "encodingFormat": forms.get(file.suffix, "text/plain"),
        "contentSize": str(file.stat().st_size),
        "sha256": _file_hex(file),
    }


def _checkpoint_entity(run: RunDir, checkpoint: CheckpointRecord) -> Entity:
    folder = Path(_named(run, checkpoint)).parent.as_posix()
    return {
        "@id": f"{folder}/",
        "@type": "Dataset",
        "name": f"Checkpoint of iteration {checkpoint.iteration}",
        "description": f"Its {MANIFEST} is {checkpoint.manifest_digest}.",
    }


def _data_entity(manifest: Manifest) -> Iterator[Entity]:
    """The data, which are no part of the crate."""
    if manifest.data is not None:
        yield {
            "@id": "#data",
            "@type": "Dataset",
            "name": "The shards that were trained on",
            "description": (
                f"{manifest.data['path']}: {manifest.data['shards']} shards, {manifest.data['bytes']} bytes; names and "
                f"sizes are {manifest.data['sizes']}"
            ),
        }
