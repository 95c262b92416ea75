"""No fresh start and no borrowed progress in silence: what a run has committed is gone on with, or missed aloud."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dfmspec.record.manifest import read_manifest
from dfmspec.record.run_dir import RunDir
from dfmspec.record.runs import find_run
from tests.conftest import dfmspec
from tests.formats.test_formats import copy_of_what_was_left


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a spec, its data, and runs of it: one has finished, one was stopped after iteration 8 of 60."""
    return copy_of_what_was_left(tmp_path / "train")


def halted(place: Path) -> RunDir:
    return find_run("halted", place / "runs")


def runs_in(place: Path) -> list[str]:
    """The run directories; `latest` and files are none."""
    return sorted(path.name for path in (place / "runs" / "halted").glob("2*"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def rename_a_key(path: Path) -> None:
    path.write_text(path.read_text().replace('"plan_id"', '"plan_ie"'))


def change_the_plan(path: Path) -> None:
    path.write_text(path.read_text().replace('"plan_id": "sha256:', '"plan_id": "sha256:0'))


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("damage", [cut_short, rename_a_key, change_the_plan, nest, Path.unlink])
def test_a_run_that_has_lost_its_record_is_not_begun_anew(damage: Callable[[Path], None], place: Path) -> None:
    before = runs_in(place)
    run = halted(place)
    damage(run.manifest)
    done = dfmspec("run", "halted.yaml", cwd=place)

    assert done.returncode == 1
    assert f"manifest.json of run {run}" in done.stderr
    assert "run.resume=never" in done.stderr
    assert runs_in(place) == before


@pytest.mark.parametrize("loss", ["checkpoints", "iterations"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(loss: str, place: Path) -> None:
    run = halted(place)
    if loss == "checkpoints":
        run.checkpoints.rename(run.path / "elsewhere")
    for path in run.checkpoints.glob("iter_*"):
        path.rename(path.with_name(f"old_{path.name}"))
    done = dfmspec("run", "halted.yaml", cwd=place)

    assert done.returncode == 1
    assert "has no checkpoint, but iteration 8 was committed" in done.stderr
    assert run.next_attempt() == 2


def test_a_finished_run_that_has_lost_its_checkpoints_says_so(place: Path) -> None:
    shutil.rmtree(find_run("tiny", place / "runs").checkpoints)
    done = dfmspec("run", "tiny.yaml", cwd=place)

    assert done.returncode == 1
    assert "has no checkpoint, but iteration 4 was committed" in done.stderr


def test_another_plan_in_the_same_folder_starts_nothing(place: Path) -> None:
    shared = place / "shared"
    shutil.copytree(halted(place).checkpoints, shared)
    before = runs_in(place)
    done = dfmspec("run", "halted.yaml", f"checkpoint.save={shared}", "optimizer.lr=0.0007", cwd=place)

    assert done.returncode == 1
    assert f"checkpoint {shared}/iter_0000008 is of another plan: " in done.stderr
    assert "optimizer.lr is 9e-05 there and 0.0007 here" in done.stderr
    assert f"run.resume={shared}" in done.stderr
    assert runs_in(place) == before


def test_nothing_is_trained_from_the_last_iteration_on(place: Path) -> None:
    done = dfmspec("run", "tiny.yaml", "optimizer.lr=0.0007", "run.resume=runs/halted/latest", cwd=place)

    assert done.returncode == 2
    assert "run.resume sets out from iteration 8, and train.train_iters is 4: nothing would be trained" in done.stderr


def test_a_copy_of_a_run_is_left_alone_and_a_changed_configuration_is_written_anew(place: Path) -> None:
    """And a record whose last attempt did not finish is not believed to have succeeded."""
    run = halted(place)
    shutil.copytree(run.path, run.path.with_name(f"{run.path.name}-copy"))
    config = run.path / "config.yaml"
    meant = config.read_text()
    config.write_text(meant.replace("\n  lr: ", "\n  lr: 3"))
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({**manifest, "verdict": "succeeded"}))
    (run.attempts / "²").mkdir()
    (run.attempts / "20261130").mkdir()
    done = dfmspec("run", "halted.yaml", cwd=place)

    assert done.returncode == 0, done.stderr
    assert "-copy is a copy of run" in done.stderr
    assert "says succeeded, and its last attempt did not finish" in done.stderr
    assert "is not what the plan gives (lr: 3" in done.stderr
    assert config.read_text() == meant
    assert [attempt.from_iteration for attempt in read_manifest(run).attempts] == [0, 8]


def test_a_changed_spec_is_told_of_a_run_that_was_killed(place: Path) -> None:
    run = halted(place)
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({**manifest, "verdict": "running", "checkpoints": []}))
    done = dfmspec("run", "halted.yaml", "optimizer.lr=0.0007", "train.train_iters=1", cwd=place)

    assert done.returncode == 0, done.stderr
    assert f"{run}, at iteration 8, has another plan" in done.stderr


def test_the_run_that_was_opened_last_goes_on_whatever_the_clock_said_then(place: Path) -> None:
    """A clock that went back gave the newer run the earlier name; `latest` knows better."""
    older = halted(place)
    newer = RunDir(older.path.with_name("20200101-000000-a6ddb1a1-0000"))
    shutil.copytree(older.path, newer.path)
    manifest = json.loads(newer.manifest.read_text())
    newer.manifest.write_text(json.dumps({**manifest, "run_id": newer.path.name}))
    latest = older.path.parent / "latest"
    latest.unlink(missing_ok=True)
    latest.symlink_to(newer.path.name)
    done = dfmspec("run", "halted.yaml", cwd=place)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(newer)


def test_never_begins_anew_where_a_tracker_alone_is_left(place: Path) -> None:
    shared = place / "shared"
    shared.mkdir()
    (shared / "latest_checkpointed_iteration.txt").write_text("8\n")
    words = ["run", "halted.yaml", f"checkpoint.save={shared}", "train.train_iters=1"]
    refused = dfmspec(*words, cwd=place)
    begun = dfmspec(*words, "run.resume=never", cwd=place)

    assert refused.returncode == 1
    assert "but iteration 8 was committed" in refused.stderr
    assert begun.returncode == 0, begun.stderr


def test_what_a_script_left_is_no_run_that_lost_its_record(place: Path) -> None:
    """A bundle's script writes to a folder by its plan's id, and leaves no record."""
    left = place / "runs" / "tiny" / "abcdef012345"
    shutil.copytree(find_run("tiny", place / "runs").checkpoints, left / "checkpoints")
    done = dfmspec("run", "tiny.yaml", cwd=place)

    assert done.returncode == 0, done.stderr
    assert "finished already" in done.stderr


def test_a_run_that_was_begun_anew_goes_on_beside_one_that_lost_its_record(place: Path) -> None:
    lost = find_run("tiny", place / "runs")
    lost.manifest.unlink()
    words = ["run", "tiny.yaml"]
    assert dfmspec(*words, cwd=place).returncode == 1
    anew = dfmspec(*words, "run.resume=never", cwd=place)
    again = dfmspec(*words, cwd=place)

    assert anew.returncode == 0, anew.stderr
    assert again.returncode == 0, again.stderr
    assert again.stdout == anew.stdout
