"""Launcher slurm without Slurm: the job script, run with stand-ins for scontrol, srun and squeue."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from dfmspec.run.launch import slurm
from tests.conftest import dfmspec

FAKES = {
    "scontrol": """case "$1 $2" in
"show job") echo "   Command=$BUNDLE/job.sbatch" ;;
"show hostnames") printf 'n1\\nn2\\n' ;;
"show node") echo "   NodeAddr=10.0.0.1 NodeHostName=$3" ;;
requeue*) echo requeued >> "$OUT/scontrol" ;;
esac""",
    "srun": """while [ "$1" != bash ]; do shift; done
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n && wait""",
    "squeue": 'echo "$RUNNING"',
    "torchrun": """echo "$NODE $*" >> "$OUT/torchrun"; touch "$OUT/started"
for _ in $(seq 100); do [ -e "$OUT/end" ] && exit "$(cat "$OUT/end")"; sleep 0.05; done""",
}
SPEC = (
    "name: job\nlauncher: {kind: slurm}\ncluster: {nnodes: 2, nproc_per_node: 8}\n"
    "train: {train_iters: 10, eval_iters: 0}\ndata: {source: mock}\n"
)


class Job:
    """A bundle of a slurm plan, and what becomes of its job script."""

    def __init__(self, folder: Path, *words: str) -> None:
        (folder / "spec.yaml").write_text(SPEC)
        made = dfmspec("plan", "spec.yaml", *words, "-o", "plan", cwd=folder)
        assert made.returncode == 0, made.stderr
        (folder / "bin").mkdir()
        for name, text in FAKES.items():
            (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        self.folder = folder

    def start(self, number: int = 7, **env: str) -> subprocess.Popen[str]:
        slurm = {
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_SUBMIT_DIR": str(self.folder),
        } | env
        paths = {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "OUT": str(self.folder),
            "BUNDLE": str(self.folder / "plan"),
            "DFM_ROOT": "/dfm",
        }
        command = ["bash", str(self.folder / "plan" / "job.sbatch")]
        return subprocess.Popen(
            command,
            env={key: value for key, value in {**paths, **slurm}.items() if value},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, number: int = 7, code: int = 0, **env: str) -> tuple[int, str]:
        (self.folder / "end").write_text(str(code))
        process = self.start(number, **env)
        said = process.communicate(timeout=60)[0]
        return process.returncode, said

    def signalled(self, code: int) -> tuple[int, str]:
        process = self.start()
        deadline = time.monotonic() + 30
        while not (self.folder / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        (self.folder / "end").write_text(str(code))
        said = process.communicate(timeout=60)[0]
        return process.returncode, said

    @property
    def requeued(self) -> bool:
        return (self.folder / "scontrol").exists()


@pytest.mark.parametrize("target", ["megatron_core", "dfm"])
def test_a_job_that_is_submitted_again_is_the_next_attempt_of_its_plans_run(target: str, tmp_path: Path) -> None:
    job = Job(tmp_path, f"target={target}")
    assert job.run(7)[0] == job.run(8)[0] == 0
    (run_dir,) = (tmp_path / "runs" / "job").iterdir()

    assert [path.name for path in sorted((run_dir / "attempts").iterdir())] == ["1", "2"]
    assert all(
        (run_dir / "attempts" / attempt / node / "exit_code").read_text() == "0\n"
        for attempt in "12"
        for node in ("node0", "node1")
    )


def test_two_jobs_are_not_at_one_run_together(tmp_path: Path) -> None:
    job = Job(tmp_path)
    assert job.run(7)[0] == 0
    code, said = job.run(8, RUNNING="7 RUNNING")

    assert code == 5
    assert "belongs to job 7" in said
    assert job.run(7, RUNNING="7 RUNNING")[0] == 0  # it was queued again itself


@pytest.mark.parametrize("gpus", ["4", ""])
def test_an_allocation_without_the_plans_gpus_is_refused(gpus: str, tmp_path: Path) -> None:
    code, said = Job(tmp_path).run(SLURM_GPUS_ON_NODE=gpus)

    assert code == 4
    assert f"the job has {gpus or 0}" in said


@pytest.mark.parametrize(
    ("words", "code", "requeued", "says"),
    [
        (("target=dfm", "launcher.time_limit=4:00:00"), 0, True, "saves and stops"),
        (("target=dfm", "launcher.time_limit=4:00:00"), 1, False, "saves and stops"),
        (("target=dfm",), 0, True, "saves and stops"),
        (("target=dfm", "train.exit_signal_handler=false"), 0, True, "from its last checkpoint"),
        (("target=megatron_core",), 1, False, "saves and stops"),
    ],
)
def test_a_job_promises_on_its_signal_what_it_does(
    words: tuple[str, ...], code: int, requeued: bool, says: str, tmp_path: Path
) -> None:
    job = Job(tmp_path, *words)
    ended, said = job.signalled(code)

    assert (ended, job.requeued) == (code, requeued)
    assert says in said


def test_variables_of_sbatch_do_not_make_another_job_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch takes them over the options in the script; those of options that the plan leaves open stay."""
    Job(tmp_path, "launcher.partition=gpu", "launcher.time_limit='4:00:00'")
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\nenv | grep ^SBATCH_\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    gone = ("PARTITION", "TIMELIMIT", "JOB_NAME", "SIGNAL", "OPEN_MODE", "GPUS_PER_NODE", "EXPORT", "ARRAY_INX")
    for name in (*gone, "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "other")

    assert slurm.check(tmp_path / "plan") == "SBATCH_ACCOUNT=other"
