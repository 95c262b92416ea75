"""A run goes on where it was: what is gone, and what is another plan's, is never passed in silence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import TRACKER, manifest_digest, problem
from dfmspec.record.progress import Identity, Progress, Start, check_start, fault_of_start
from dfmspec.record.run_dir import RunDir
from tests.record.made import CONFIG, checkpoint, event

OWN = Identity(CONFIG, "sha256:own")
OTHER_CONFIG = {**CONFIG, "optimizer": {"lr": 7e-4}}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that has committed iterations 2 and 4, and says so everywhere."""
    run = RunDir(tmp_path / "runs" / "d" / "1")
    lines = []
    records = []
    for iteration in (2, 4):
        path = checkpoint(run.checkpoints, iteration, plan_id=OWN.plan_id)
        digest = manifest_digest(path)
        lines.append(event("checkpoint", iteration, path=str(path), manifest_digest=digest))
        records.append({"iteration": iteration, "path": str(path), "manifest_digest": digest})
    (run.checkpoints / TRACKER).write_text("4\n")
    run.events.write_text("".join(lines))
    run.manifest.write_text(json.dumps({"checkpoints": records}))
    return run


def checked(run: RunDir, found: Path | None, identity: Identity = OWN, save: Path | None = None) -> list[str]:
    """What is told of a start."""
    told: list[str] = []
    check_start(found, Progress.of(run, save or run.checkpoints), identity, told.append)
    return told


def newest(run: RunDir) -> Path:
    return run.checkpoints / "iter_0000004"


def test_what_is_there_and_its_own_is_gone_on_from_without_a_word(run: RunDir) -> None:
    assert checked(run, newest(run)) == []


def test_a_run_that_has_committed_nothing_begins(tmp_path: Path) -> None:
    assert checked(RunDir(tmp_path), None) == []


@pytest.mark.parametrize("witness", ["events.jsonl", "manifest.json", TRACKER])
def test_one_witness_is_enough_to_stop_a_fresh_start(witness: str, run: RunDir) -> None:
    for path in (run.events, run.manifest, run.checkpoints / TRACKER):
        if path.name != witness:
            path.unlink()
    for folder in run.checkpoints.glob("iter_*"):
        shutil.rmtree(folder)
    with pytest.raises(CheckpointError) as caught:
        checked(run, None)

    assert "iteration 4 was committed" in str(caught.value)
    assert witness in str(caught.value)
    assert ("run.resume=never" in str(caught.value)) == (witness == "manifest.json")  # scripts have no such word


def test_the_newest_that_is_gone_is_told(run: RunDir) -> None:
    shutil.rmtree(newest(run))
    (told,) = checked(run, run.checkpoints / "iter_0000002")

    assert "The checkpoint of iteration 4" in told
    assert "training goes on from iteration 2" in told


@pytest.mark.parametrize(
    ("config", "plan_id", "difference"),
    [
        (OTHER_CONFIG, "sha256:other", "optimizer.lr is 0.0007 there and 0.0001 here"),
        (CONFIG, "sha256:other", "the same configuration, under another name"),
        (OTHER_CONFIG, None, "optimizer.lr is 0.0007 there and 0.0001 here"),
    ],
)
def test_another_plans_checkpoint_is_refused_with_what_differs(
    config: dict[str, Any], plan_id: str | None, difference: str, run: RunDir, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    found = checkpoint(shared, 6, config=config, plan_id=plan_id)
    with pytest.raises(CheckpointError) as caught:
        checked(run, found, save=shared)

    assert "is of another plan" in str(caught.value)
    assert difference in str(caught.value)
    assert f"run.resume={shared}" in str(caught.value)


def test_another_datasets_progress_is_another_plans(run: RunDir, tmp_path: Path) -> None:
    theirs = {**CONFIG, "dataset": {"path": "/data/a"}}
    ours = {**CONFIG, "dataset": {"path": "/data/b"}}
    found = checkpoint(tmp_path / "shared", 6, config=theirs)
    with pytest.raises(CheckpointError, match=r"dataset\.path is '/data/a' there and '/data/b' here"):
        checked(run, found, Identity(ours, "sha256:own"), save=tmp_path / "shared")


def test_a_checkpoint_without_a_plan_in_the_runs_own_folder_is_its_own(run: RunDir) -> None:
    """Earlier versions wrote no plan, and a run directory may have been moved with its data."""
    theirs = {**CONFIG, "dataset": {"path": "/then/data"}}
    ours = {**CONFIG, "dataset": {"path": "/now/data"}}
    found = checkpoint(run.checkpoints, 6, config=theirs)

    assert checked(run, found, Identity(ours, "sha256:own")) == []


def test_what_somebody_has_named_is_gone_on_from_and_told(run: RunDir, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    run.manifest.write_text(json.dumps({"starts_from": {"load": str(shared)}}))
    run.events.unlink()
    found = checkpoint(shared, 6, config=OTHER_CONFIG, plan_id="sha256:other")
    (told,) = checked(run, found, save=shared)

    assert "was written with other values: optimizer.lr is 0.0007 there and 0.0001 here" in told


def test_what_a_person_types_is_told(run: RunDir) -> None:
    found = checkpoint(run.checkpoints, 6, config=OTHER_CONFIG)
    (told,) = checked(run, found, Identity(CONFIG, None))

    assert "was written with other values" in told


def test_a_manifest_that_was_changed_after_its_commit_is_known(run: RunDir) -> None:
    path = newest(run) / "manifest.json"
    path.write_text(path.read_text().replace('"sha256:own"', '"sha256:oWn"'))

    assert problem(newest(run)) is None
    assert problem(newest(run), Progress.of(run, run.checkpoints).digests) == (
        "its manifest.json is not the one that was committed"
    )


@pytest.mark.parametrize(
    "junk", ["[]", "[" * 100_000, '{"checkpoints": 3}', '{"checkpoints": [1, {"iteration": "x"}]}']
)
def test_a_damaged_record_is_no_witness_and_no_exception(junk: str, run: RunDir) -> None:
    run.manifest.write_text(junk)
    run.events.write_text(junk)
    (run.checkpoints / TRACKER).write_text(junk)

    assert Progress.of(run, run.checkpoints).iteration == 0


@pytest.mark.parametrize(
    ("committed", "started", "first", "fault"),
    [
        (0, 0, 1, None),
        (6, 6, 7, None),
        (6, 4, 5, None),
        (6, 4, None, None),
        (6, 0, 1, "it began anew, although iteration 6 was committed before"),
        (6, 6, 1, "its first iteration was 1, and 7 was to be"),
        (0, 4, 4, "its first iteration was 4, and 5 was to be"),
        (0, 4, 6, None),
    ],
)
def test_the_first_iteration_is_the_one_that_was_to_be(
    committed: int, started: int, first: int | None, fault: str | None
) -> None:
    assert fault_of_start(Start(committed), started=started, first=first) == fault


@pytest.mark.parametrize(
    ("start", "started", "fault"),
    [
        (Start(6, is_exact=True), 4, "it set out from iteration 4, although 6 was committed before"),
        (Start(6, is_exact=True), 6, None),
        (Start(6, "/elsewhere", is_exact=True), 8, None),
        (Start(0, "/elsewhere"), 0, "it started from random weights, and /elsewhere was to be gone on from"),
        (Start(0, "/elsewhere"), 20, None),
    ],
)
def test_a_start_elsewhere_and_one_that_must_be_exact(start: Start, started: int, fault: str | None) -> None:
    assert fault_of_start(start, started=started, first=None) == fault
