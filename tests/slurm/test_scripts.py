"""A script that knows nothing of dfmspec as a job of a real Slurm: watched, stopped, gone on with; and refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dfmspec.record.events import read_events
from tests.conftest import dfmspec, environment
from tests.run.test_scripts import STAND_IN

pytestmark = pytest.mark.slurm
SPEC = f"""
spec_version: 1
name: dit
target: dfm
cluster: {{nnodes: 2, nproc_per_node: 1, device: cpu}}
launcher: {{kind: slurm, root: {STAND_IN}, time_limit: "10:00"}}
data: {{source: mock}}
train: {{global_batch_size: 2, train_iters: 20, eval_iters: 0}}
logger: {{log_interval: 1}}
checkpoint: {{save_interval: 10}}
"""


@pytest.fixture
def spec(cluster: Path, tmp_path: Path) -> Path:
    path = tmp_path / "with space" / "dit.yaml"
    path.parent.mkdir()
    path.write_text(SPEC)
    return path


def manifest_of(run_dir: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(run_dir.strip()) / "manifest.json").read_text())
    return loaded


def test_a_job_is_watched_stopped_by_a_signal_and_gone_on_with(spec: Path) -> None:
    folder = spec.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "dfmspec", "run", "dit.yaml", "--allow-revision"],
        cwd=folder,
        env=environment(STANDIN_SECONDS="0.5"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not any(read_events(events, kinds=["iteration"]) for events in folder.glob("runs/dit/2*/events.jsonl")):
        assert time.monotonic() < deadline, process.communicate()
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    stopped_at = manifest_of(out)["attempts"][0]["to_iteration"]
    on = dfmspec("run", out.strip(), "--allow-revision", cwd=folder, STANDIN_SECONDS="0.01")
    manifest = manifest_of(out)

    assert process.returncode == 75, err
    assert 0 < stopped_at < 20
    assert on.returncode == 0, on.stderr
    assert [attempt["from_iteration"] for attempt in manifest["attempts"]] == [0, stopped_at]
    assert manifest["verdict"] == "succeeded"
    assert {path.parent.name for path in Path(out.strip()).glob("attempts/2/node*/rank*/stdout")} == {"rank0", "rank1"}
    assert manifest["environment"]["training"]["sources"]


def test_a_node_that_lacks_something_ends_the_job_which_is_not_tried_again(spec: Path) -> None:
    done = dfmspec("run", "dit.yaml", cwd=spec.parent)
    manifest = manifest_of(done.stdout)
    (attempt,) = manifest["attempts"]

    assert done.returncode == 4, done.stderr
    assert attempt["failure"]["error_type"] == "configuration"
    assert "another revision than 7cb7634" in done.stderr
    assert manifest["verdict"] == "failed"
    assert "Traceback" not in done.stderr


def test_a_job_that_nobody_watched_is_judged_by_its_logs(spec: Path) -> None:
    left = dfmspec("run", "dit.yaml", "--allow-revision", "--detach", cwd=spec.parent, STANDIN_SECONDS="0.01")
    job = json.loads(next(Path(left.stdout.strip()).glob("attempts/1/slurm.json")).read_text())["job"]
    deadline = time.monotonic() + 90
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, check=False).stdout.strip():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    again = dfmspec("run", "dit.yaml", "--allow-revision", cwd=spec.parent)

    assert left.returncode == 0, left.stderr
    assert again.returncode == 0, again.stderr
    assert "has finished while nobody watched it" in again.stderr
    events = read_events(Path(again.stdout.strip()) / "events.jsonl", kinds=["iteration"])
    assert [event["iteration"] for event in events] == [*range(1, 21)]


def started_job(folder: Path, *words: str, until: int) -> str:
    """A job that nobody watches, once it has told of an iteration; its run directory."""
    left = dfmspec("run", "dit.yaml", *words, "--allow-revision", "--detach", cwd=folder, STANDIN_SECONDS="0.5")
    assert left.returncode == 0, left.stderr
    log = Path(left.stdout.strip()) / "attempts" / "1" / "node1" / "rank1" / "stdout"
    deadline = time.monotonic() + 90
    while not log.exists() or f"iteration {until:8d}/" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return left.stdout.strip()


def test_a_job_that_has_saved_is_watched_again_and_left_alone(spec: Path) -> None:
    words = ["checkpoint.save_interval=4", "train.train_iters=24"]
    run_dir = started_job(spec.parent, *words, until=6)
    again = dfmspec("run", "dit.yaml", *words, "--allow-revision", cwd=spec.parent)
    (attempt,) = manifest_of(run_dir)["attempts"]

    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == run_dir
    assert (attempt["from_iteration"], attempt["to_iteration"]) == (0, 24)


def test_a_run_that_began_elsewhere_is_requeued_where_it_was(spec: Path) -> None:
    shared = spec.parent / "shared"
    first = dfmspec(
        "run", "dit.yaml", "train.train_iters=5", f"checkpoint.save={shared}", "--allow-revision",
        cwd=spec.parent, STANDIN_SECONDS="0.01",
    )  # fmt: skip
    words = [f"run.resume={shared}", "train.train_iters=30", "checkpoint.save_interval=4"]
    run_dir = started_job(spec.parent, *words, until=10)
    job = json.loads((Path(run_dir) / "attempts" / "1" / "slurm.json").read_text())["job"]
    subprocess.run(["scontrol", "requeue", job], check=True)
    again = dfmspec("run", "dit.yaml", *words, "--allow-revision", cwd=spec.parent)
    attempts = manifest_of(run_dir)["attempts"]

    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert attempts[0]["from_iteration"] == 5
    assert attempts[1]["from_iteration"] >= 8
    assert attempts[-1]["to_iteration"] == 30


def test_another_plans_checkpoints_are_refused_under_slurm_too(spec: Path) -> None:
    words = [f"checkpoint.save={spec.parent / 'shared'}", "--allow-revision"]
    first = dfmspec("run", "dit.yaml", "train.train_iters=5", *words, cwd=spec.parent, STANDIN_SECONDS="0.01")
    other = dfmspec("run", "dit.yaml", "train.train_iters=6", *words, cwd=spec.parent)

    assert first.returncode == 0, first.stderr
    assert other.returncode == 1
    assert "are of another plan" in other.stderr
