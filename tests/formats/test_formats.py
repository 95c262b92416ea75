"""What 2ade833 wrote is read, resumed, sampled, exported and compared by today's code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dfmspec.record.events import read_events
from dfmspec.record.manifest import read_manifest
from dfmspec.record.runs import find_run
from tests.conftest import dfmspec

WRITTEN = Path(__file__).parent / "2ade833"
LAUNCHERS = ("local", "ssh", "slurm", "kubernetes")


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A copy of what was left: a test may go on with it."""
    return copy_of_what_was_left(tmp_path / "train")


def copy_of_what_was_left(folder: Path) -> Path:
    """What 2ade833 wrote, in a new place and with its paths."""
    shutil.copytree(WRITTEN, folder, symlinks=True)
    for name in ("config.yaml", "manifest.json"):
        for path in folder.glob(f"runs/*/2*/{name}"):
            path.write_text(path.read_text().replace("/home/ada/train", str(folder)))
    return folder


def test_runs_are_listed_and_shown() -> None:
    listed = dfmspec("runs", cwd=WRITTEN)
    finished = dfmspec("show", "tiny", cwd=WRITTEN)
    halted = dfmspec("show", "halted", cwd=WRITTEN)

    assert listed.stdout.count("succeeded") == 1
    assert listed.stdout.count("stopped") == 1
    assert "iteration 4 was reached and its checkpoint is whole" in finished.stdout
    assert "stopped by a signal after iteration 8" in halted.stdout


def test_a_finished_run_is_not_run_again(left: Path) -> None:
    again = dfmspec("run", "tiny.yaml", cwd=left)

    assert again.returncode == 0, again.stderr
    assert "finished already" in again.stderr


def test_an_interrupted_run_goes_on_as_it_would_have(left: Path) -> None:
    again = dfmspec("run", "halted.yaml", cwd=left)

    assert again.returncode == 0, again.stderr
    run = find_run("halted", left / "runs")
    assert again.stdout.strip() == str(run)
    assert read_manifest(run).attempts[1].from_iteration == 8
    events = [event for event in read_events(run.events) if event["type"] == "iteration"]
    expected = json.loads((WRITTEN / "resumed.json").read_text())
    losses = {str(event["iteration"]): event["loss"] for event in events if event["iteration"] > 8}
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_of_then_starts_another_run(left: Path) -> None:
    again = dfmspec("run", "tiny.yaml", "run.resume=runs/tiny/latest", "train.train_iters=6", cwd=left)

    assert again.returncode == 0, again.stderr
    assert "Iteration 5/6" in again.stderr
    assert "Iteration 4/6" not in again.stderr


def test_a_checkpoint_is_sampled_as_then(left: Path) -> None:
    drawn = dfmspec("sample", "runs/tiny/latest", "--num-samples", 1, "--out", "again", cwd=left)

    assert drawn.returncode == 0, drawn.stderr
    then = np.asarray(Image.open(WRITTEN / "sampled" / "sample_000.png"), dtype=float)
    now = np.asarray(Image.open(left / "again" / "sample_000.png"), dtype=float)
    assert np.abs(then - now).max() <= 2  # of 255: another processor rounds otherwise


def test_weights_are_exported_as_then(left: Path) -> None:
    exported = dfmspec("export", "runs/tiny/latest", "-o", "again.safetensors", cwd=left)

    assert exported.returncode == 0, exported.stderr
    then = load_file(WRITTEN / "weights.safetensors")
    now = load_file(left / "again.safetensors")
    assert then.keys() == now.keys()
    for name, weight in then.items():
        assert torch.equal(weight, now[name]), name


def test_exported_weights_start_a_run(left: Path) -> None:
    started = dfmspec("run", "tiny.yaml", "checkpoint.pretrained_checkpoint=weights.safetensors", cwd=left)

    assert started.returncode == 0, started.stderr


def test_a_dataset_is_checked_and_inspected() -> None:
    checked = dfmspec("validate", "tiny.yaml", "--check", "spec,paths,data", cwd=WRITTEN)
    inspected = dfmspec("data", "inspect", "data", cwd=WRITTEN)

    assert checked.returncode == 0, checked.stdout
    assert inspected.returncode == 0, inspected.stdout
    assert json.loads(inspected.stdout)["samples"] == {"train": 6, "val": 1, "test": 1}


def test_a_plan_of_today_is_that_of_then() -> None:
    for name in ("tiny", "halted"):
        compared = dfmspec("plan", f"{name}.yaml", "--diff", f"runs/{name}/latest", cwd=WRITTEN)
        assert compared.stdout == "no difference\n", compared.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_bundle_is_compared_and_not_run(launcher: str, left: Path) -> None:
    """Its guards hold a digest of the code that it was made with."""
    compared = dfmspec("plan", "tiny.yaml", "--diff", f"bundles/{launcher}", cwd=left)
    started = dfmspec("run", f"bundles/{launcher}", cwd=left)

    assert compared.returncode == 0, compared.stderr
    assert ("no difference" in compared.stdout) == (launcher == "local")
    assert started.returncode == 3, started.stderr
    assert "dfmspec's own code has changed since it was made; make the plan again" in started.stderr
