"""Jobs of a real Slurm: submitted, watched, finished; cancelled; requeued, resumed; stopped; left and found again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, dfmspec, environment

pytestmark = pytest.mark.slurm
JOB = [
    "launcher.kind=slurm",
    "cluster.nnodes=2",
    "cluster.nproc_per_node=1",
    *TINY,
    "train.global_batch_size=2",
    "logger.log_interval=1",
]
LONG = [*JOB, "train.train_iters=100000", "checkpoint.save_interval=5"]


@pytest.fixture
def spec(cluster: Path, dataset: Path, tmp_path: Path) -> Path:
    file = tmp_path / "with space" / "spec.yaml"
    file.parent.mkdir()
    file.write_text(
        f"name: job\ndataset: {{path: {dataset}, task_encoder_seq_length: 256}}\n"
        f"run: {{output_dir: {tmp_path}/run's}}\n"
    )
    return file


@pytest.fixture
def started(spec: Path, tmp_path: Path) -> Iterator[Any]:
    """Start `dfmspec run` and wait until its run has come to an iteration."""
    processes = []

    def start(*words: str, until: int = 3, says: str = "attempt") -> tuple[subprocess.Popen[str], Path]:
        said = tmp_path / f"supervisor{len(processes)}.log"
        log = said.open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "dfmspec", "run", str(spec), *words],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        processes.append(process)
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and process.poll() is None:
            for events in tmp_path.glob("run's/job/*/events.jsonl"):
                if f'"iteration": {until}' in events.read_text() and says in said.read_text():
                    return process, events.parent
            time.sleep(0.2)
        pytest.fail(f"no iteration {until}: {said.read_text()}")

    yield start
    for process in processes:
        process.kill()


def manifest_of(run_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_dir / "manifest.json").read_text())
    return loaded


def job_of(run_dir: Path) -> str:
    text = next((run_dir / "attempts").glob("*/slurm.json")).read_text()
    return str(json.loads(text)["job"])


def test_a_run_of_two_nodes_is_submitted_watched_and_finished(spec: Path) -> None:
    done = dfmspec("run", spec, *JOB, "train.train_iters=4", "launcher.time_limit=10:00")
    assert done.returncode == 0, done.stderr
    run_dir = Path(done.stdout.strip())
    manifest = manifest_of(run_dir)
    (attempt,) = manifest["attempts"]

    assert manifest["verdict"] == "succeeded"
    assert attempt["to_iteration"] == 4
    assert [node["exit_code"] for node in attempt["nodes"]] == [0, 0]
    assert all(node["host"] for node in attempt["nodes"])
    assert "Slurm job" in done.stderr
    assert "Iteration 4/4" in done.stderr
    assert {path.parent.name for path in run_dir.glob("attempts/1/node*/rank*/stdout")} == {"rank0", "rank1"}
    assert (
        dfmspec("run", spec, *JOB, "train.train_iters=4", "launcher.time_limit=20:00").returncode == 0
    )  # the same plan: nothing to do


def test_with_c10d_the_nodes_agree_on_their_ranks(spec: Path) -> None:
    done = dfmspec("run", spec, *JOB, "train.train_iters=2", "launcher.rendezvous=c10d")

    assert done.returncode == 0, done.stderr


def test_a_cancelled_job_fails_with_slurms_word(started: Any) -> None:
    process, run_dir = started(*LONG)
    subprocess.run(["scancel", job_of(run_dir)], check=True)
    process.wait(timeout=60)
    manifest = manifest_of(run_dir)

    assert process.returncode in (1, 75)
    assert manifest["verdict"] in (
        "failed",
        "stopped",
    )  # the ranks may have saved within the time that Slurm leaves them
    assert "CANCELLED" in manifest["reason"] or manifest["verdict"] == "stopped"


def test_before_its_time_limit_a_run_saves_and_is_queued_again(started: Any) -> None:
    """The signal is sent by hand: it is the one that --signal=B:USR1 has Slurm send."""
    process, run_dir = started(*JOB, "train.train_iters=60", "checkpoint.save_interval=1000")
    subprocess.run(["scancel", "--signal=USR1", "--batch", job_of(run_dir)], check=True)
    process.wait(timeout=180)
    manifest = manifest_of(run_dir)
    first, second = manifest["attempts"]

    assert process.returncode == 0
    assert manifest["verdict"] == "succeeded"
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished")
    assert 3 <= first["to_iteration"] == second["from_iteration"] < second["to_iteration"] == 60
    assert (run_dir / "attempts" / "2" / "node1" / "rank1" / "stdout").exists()


def test_a_requeue_by_the_operator_goes_on_from_the_last_checkpoint(started: Any) -> None:
    process, run_dir = started(*LONG, until=7)
    subprocess.run(["scontrol", "requeue", job_of(run_dir)], check=True)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and "Resumed from" not in _text(
        run_dir / "attempts" / "2" / "node0" / "rank0" / "stdout"
    ):
        time.sleep(0.5)
    resumed = re.search(
        r"Resumed from iteration (\d+)", _text(run_dir / "attempts" / "2" / "node0" / "rank0" / "stdout")
    )
    process.send_signal(signal.SIGINT)
    process.wait(timeout=150)

    assert resumed
    assert int(resumed[1]) >= 5
    assert process.returncode == 75
    assert [attempt["number"] for attempt in manifest_of(run_dir)["attempts"]] == [1, 2]


def test_a_supervisor_that_dies_leaves_the_job_and_the_next_one_finds_it(started: Any) -> None:
    process, run_dir = started(*LONG)
    job = job_of(run_dir)
    process.kill()
    process.wait()
    process, _ = started(*LONG, until=5, says=f"job {job} goes on")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=150)
    (attempt,) = manifest_of(run_dir)["attempts"]

    assert process.returncode == 75
    assert attempt["outcome"] == "stopped"
    assert attempt["signal"] == signal.SIGTERM
    assert job_of(run_dir) == job
    assert len(list(run_dir.glob("attempts/*"))) == 1


def test_a_detached_run_is_watched_later(spec: Path, tmp_path: Path) -> None:
    detached = dfmspec("run", spec, *JOB, "train.train_iters=4", "--detach")
    assert detached.returncode == 0, detached.stderr
    assert manifest_of(Path(detached.stdout.strip()))["verdict"] == "running"
    watched = dfmspec("run", spec, *JOB, "train.train_iters=4")

    assert watched.returncode == 0
    assert watched.stdout == detached.stdout
    assert len(manifest_of(Path(watched.stdout.strip()))["attempts"]) == 1


def test_what_slurm_did_while_nobody_watched_is_written_down(spec: Path) -> None:
    words = [*JOB, "train.train_iters=60", "checkpoint.save_interval=1000"]
    run_dir = Path(dfmspec("run", spec, *words, "--detach").stdout.strip())
    _wait_for('"iteration": 3', run_dir / "events.jsonl")
    subprocess.run(["scancel", "--signal=USR1", "--batch", job_of(run_dir)], check=True)
    _wait_for('"finished"', run_dir / "events.jsonl")
    _wait_for("0", run_dir / "attempts" / "2" / "node1" / "exit_code")
    while subprocess.run(
        ["squeue", "--noheader", f"--jobs={job_of(run_dir)}"], capture_output=True, check=False
    ).stdout:
        time.sleep(0.5)
    done = dfmspec("run", spec, *words)
    manifest = manifest_of(run_dir)
    first, second = manifest["attempts"]

    assert done.returncode == 0
    assert manifest["verdict"] == "succeeded"
    assert "is submitted" not in done.stderr
    assert (first["outcome"], second["outcome"]) == ("stopped", "finished")
    assert first["to_iteration"] == second["from_iteration"]
    assert [node["exit_code"] for attempt in (first, second) for node in attempt["nodes"]] == [0] * 4
    assert first["started"] < first["ended"] <= second["started"] < second["ended"]


def test_a_bundle_stands_alone_and_refuses_another_allocation(spec: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "the plan"
    assert dfmspec("plan", spec, *JOB, "train.train_iters=2", "-o", bundle).returncode == 0
    env = environment(PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin")

    def submit(*options: str) -> tuple[int, str]:
        log = tmp_path / f"{len(options)}.log"
        done = subprocess.run(
            ["sbatch", "--wait", f"--output={log}", *options, str(bundle / "job.sbatch")],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            check=False,
        )
        return done.returncode, log.read_text()

    assert submit()[0] == 0
    (events,) = tmp_path.glob("run's/job/*/events.jsonl")
    assert submit("--comment=again", "--quiet")[0] == 0
    assert (events.parent / "attempts" / "2").is_dir()
    assert '"finished"' in events.read_text()
    code, said = submit("--nodes=1")
    assert code == 4
    assert "the plan is for 2 nodes, and the job has 1" in said


def test_slurm_is_asked_beforehand(spec: Path) -> None:
    taken = dfmspec("plan", spec, *JOB, "--check", "scheduler")
    refused = dfmspec("plan", spec, *JOB, "cluster.nnodes=3", "train.global_batch_size=3", "--check", "scheduler")

    assert taken.returncode == 0
    assert "to start at" in taken.stdout
    assert refused.returncode == 4
    assert "Slurm refuses the job" in refused.stderr
    assert "Traceback" not in refused.stderr


def _wait_for(words: str, path: Path) -> None:
    deadline = time.monotonic() + 180
    while words not in _text(path):
        assert time.monotonic() < deadline, f"{path} has no {words}: {_text(path)[-500:]}"
        time.sleep(0.5)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
