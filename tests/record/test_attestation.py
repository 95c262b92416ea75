"""A run's record as SLSA provenance and as a Process Run Crate, judged by others' validators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rocrate
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from rocrate_validator import models, services
from rocrate_validator.utils import document_loader

from dfmspec.errors import DataError
from dfmspec.record.attestation import ro_crate, slsa
from dfmspec.record.manifest import Attempt, CheckpointRecord, Manifest
from dfmspec.record.run_dir import RunDir
from tests.conftest import dfmspec

DIGEST = "sha256:" + "0f" * 32
PROFILES = ("ro-crate-1.1", "process-run-crate-0.5")


def made(folder: Path, **more: Any) -> tuple[RunDir, Manifest]:
    """The record of a run that has finished, with some of its files."""
    run = RunDir(folder / "20261201-1")
    (run.path / "checkpoints/iter_0000002").mkdir(parents=True)
    for name in ("spec.yaml", "plan.json", "config.yaml", "events.jsonl"):
        (run.path / name).write_text("{}")
    attempt = Attempt(
        number=1, started="2026-12-01T09:00:00Z", ended="2026-12-01T09:30:00Z", nodes=[], outcome="finished"
    )
    checkpoint = CheckpointRecord(iteration=2, path=str(run.path / "checkpoints/iter_0000002"), manifest_digest=DIGEST)
    values: dict[str, Any] = {
        "run_id": run.path.name,
        "name": "butterflies",
        "plan_id": DIGEST,
        "spec_file": "s.yaml",
        "spec_digest": DIGEST,
        "config_digest": DIGEST,
        "overrides": ["optimizer.lr=1e-3"],
        "guards": {"container": DIGEST},
        "created": "2026-12-01T09:00:00Z",
        "git": {"commit": "a" * 40, "remote": "https://example.org/x.git", "submodules": {"3rdparty/y": "b" * 40}},
        "code": {"version": "0.1.0", "commit": "c" * 40, "dirty": False},
        "data": {"path": "/data/with blank", "shards": 8, "bytes": 9, "sizes": DIGEST},
        "environment": {"packages": {"torch": "2.13.0+cpu", "numpy": "2.4.6"}},
        "attempts": [attempt],
        "checkpoints": [checkpoint],
        "verdict": "succeeded",
        "reason": "iteration 2 of 2",
    }
    manifest = Manifest.model_validate(values | more)
    run.manifest.write_text(manifest.model_dump_json())
    return run, manifest


LEAST: dict[str, Any] = {
    "git": None,
    "code": {},
    "data": None,
    "spec_file": None,
    "spec_digest": None,
    "guards": {},
    "environment": {},
    "attempts": [],
    "verdict": "running",
    "reason": "",
}
"""What a record may lack."""


@pytest.mark.parametrize("more", [{}, LEAST], ids=["all", "least"])
def test_the_statement_is_one_of_in_totos_with_slsas_provenance(tmp_path: Path, more: dict[str, Any]) -> None:
    data = slsa(*made(tmp_path, **more))
    statement = json_format.ParseDict(data, statement_pb2.Statement())
    Statement(statement.subject, statement.predicate_type, statement.predicate).validate()
    provenance = json_format.ParseDict(data["predicate"], provenance_pb2.Provenance())

    assert statement.subject[0].name == "checkpoints/iter_0000002/manifest.json"
    assert statement.subject[0].digest["sha256"] == "0f" * 32
    assert provenance.run_details.metadata.invocation_id == "20261201-1"
    assert len(provenance.build_definition.resolved_dependencies) == (0 if more else 7)


def test_a_run_without_a_checkpoint_has_nothing_to_tell_of(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has committed no checkpoint"):
        slsa(*made(tmp_path, checkpoints=[]))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The words of RO-Crate from the package that carries them: nothing is fetched."""
    words = json.loads((Path(rocrate.__file__).parent / "data/ro-crate.jsonld").read_text())
    own = document_loader._original_source_to_json

    def loaded(source: Any, *more: Any, **named: Any) -> Any:
        return (words, None) if "w3id.org/ro/crate" in str(source) else own(source, *more, **named)

    monkeypatch.setattr(document_loader, "_patched_source_to_json", loaded)
    monkeypatch.setattr(document_loader, "_installed", False)
    yield
    document_loader.uninstall_document_loader()


def issues(crate: Path, profile: str) -> list[str]:
    """What a validator says of a crate; but for whether the words can be fetched, since nothing is."""
    settings = services.ValidationSettings(
        rocrate_uri=str(crate),
        profile_identifier=profile,
        requirement_severity=models.Severity.REQUIRED,
        offline=True,
    )
    said = [f"{issue.check.identifier}: {issue.message}" for issue in services.validate(settings).get_issues()]
    return [issue for issue in said if "Unable to retrieve the JSON-LD context" not in issue]


@pytest.mark.parametrize("more", [{}, LEAST], ids=["all", "least"])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_run_directory_is_a_crate(tmp_path: Path, profile: str, more: dict[str, Any], offline: None) -> None:
    run, manifest = made(tmp_path, **more)
    (run.path / "ro-crate-metadata.json").write_text(json.dumps(ro_crate(run, manifest)))

    assert issues(run.path, profile) == []


def test_the_validator_sees_a_crate_that_is_none(tmp_path: Path, offline: None) -> None:
    run, manifest = made(tmp_path)
    crate = ro_crate(run, manifest)
    crate["@graph"] = [each for each in crate["@graph"] if each["@id"] != "#dfmspec"]
    (run.path / "ro-crate-metadata.json").write_text(json.dumps(crate))

    assert issues(run.path, PROFILES[1]) != []


def test_a_record_is_exported_once_and_without_secrets(tmp_path: Path) -> None:
    run, _ = made(tmp_path, overrides=["launcher.setup=[export HF_TOKEN=0123456789abc]"])
    for form, name in (("slsa", "provenance.slsa.json"), ("ro-crate", "ro-crate-metadata.json")):
        first = dfmspec("export", run.path, "--provenance", form)
        again = dfmspec("export", run.path, "--provenance", form)
        assert (first.returncode, first.stdout) == (0, f"{run.path / name}\n")
        assert again.returncode == 2
        assert "it exists already" in again.stderr
        assert "0123456789abc" not in (run.path / name).read_text()


@pytest.mark.parametrize("words", [["--raw"], ["--names", "dfm"], ["--for", "dfm"]])
def test_options_of_weights_are_refused_beside_it(tmp_path: Path, words: list[str]) -> None:
    run, _ = made(tmp_path)

    assert dfmspec("export", run.path, "--provenance", "slsa", *words).returncode == 2
    assert dfmspec("export", tmp_path, "--provenance", "slsa").returncode == 2
