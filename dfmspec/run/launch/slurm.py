"""Launcher slurm: a job script that stands alone, and a watcher of the job.

The script gives every node its script by `srun`, refuses an allocation that is not the plan's, and before the time limit asks the
run to save and queues the job again: the next attempt goes on from there. The run directory is on a file system that all nodes share.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from dfmspec.errors import PreflightError
from dfmspec.plan.plan import Plan
from dfmspec.plan.scripts import SCRIPT_A_NODE, heading, where
from dfmspec.record.verdict import exit_code_left
from dfmspec.run.launch import Place
from dfmspec.run.launch.remote import ask_to_stop, programs_path
from dfmspec.targets import target_module

OUTLIVES = True
JOB = "job.sbatch"
_ID = "slurm.json"
_SECONDS_BETWEEN_QUESTIONS = 2.0
_SECONDS_FOR_THE_LAST_FILES = 10.0
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT", "GONE"}
"""Every other state, also one of a later Slurm, is one of a job that goes on."""


def files(plan: Plan) -> dict[str, str]:
    """job.sbatch."""
    return {JOB: job_script(plan)}


def job_script(plan: Plan) -> str:
    """The job: `sbatch job.sbatch` from the bundle, without dfmspec; or submitted by `dfmspec run`, which says where things go."""
    options = [f"--job-name={plan.name}", f"--nodes={plan.nnodes}", "--ntasks-per-node=1"]
    if plan.gpus_per_node:
        options.append(f"--gpus-per-node={plan.gpus_per_node}")
    options += [f"--{key}={plan.launcher[key]}" for key in ("partition", "account", "qos") if plan.launcher[key] is not None]
    if plan.launcher["time_limit"] is not None:
        options.append(f"--time={plan.launcher['time_limit']}")
    options += ["--requeue", "--open-mode=append", f"--signal=B:USR1@{plan.launcher['stop_before']}", *plan.launcher["sbatch_options"]]
    script = 'node$SLURM_NODEID.sh"' if plan.nnodes <= SCRIPT_A_NODE else 'node.sh" "$SLURM_NODEID"'
    ours = target_module(plan.target).OWN
    again = '[ "$again" = yes ] && [ "$code" = 0 ]' + (' && ! tail -n 1 "$DFMSPEC_RUN_DIR/events.jsonl" | grep -q \'"type": "finished"\'' if ours else "")
    shebang, comment, _ = heading(f"{plan.name}: Slurm job; plan {plan.plan_id[:12]}. Submit it where relative paths are relative to: sbatch DIR/{JOB}")
    return "\n".join([
        shebang, comment,
        *(f"#SBATCH {_option(option)}" for option in options),
        "set -euo pipefail",
        'DFMSPEC_BUNDLE="${DFMSPEC_BUNDLE:-$(dirname "$(scontrol show job "$SLURM_JOB_ID" | sed -n \'s/^ *Command=//p\')")}"',
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f'if [ "${{#hosts[@]}}" != {plan.nnodes} ]; then',
        f'    echo "error: the plan is for {plan.nnodes} nodes, and the job has ${{#hosts[@]}}; submit the script as it is" >&2',
        "    exit 4",
        "fi",
        *_gpu_check(plan),
        *where(plan, "$SLURM_SUBMIT_DIR"),
        *_ATTEMPT,
        'export DFMSPEC_ATTEMPT_DIR="$DFMSPEC_RUN_DIR/attempts/$attempt" DFMSPEC_RDZV_ID="$SLURM_JOB_ID.$attempt" TQDM_DISABLE=1',
        "port=$((20000 + (SLURM_JOB_ID + attempt) % 10000))",
        *(
            [
                'MASTER_ADDR="$(scontrol show node "${hosts[0]}" | sed -n \'s/.*NodeAddr=\\([^ ]*\\).*/\\1/p\')"',
                'export MASTER_ADDR MASTER_PORT="$port"',
            ]
            if plan.nnodes > 1
            else ['export PET_MASTER_ADDR=127.0.0.1 PET_MASTER_PORT="$port"']
        ),
        'if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi',
        'mkdir -p "$DFMSPEC_ATTEMPT_DIR"',
        'echo "attempt $attempt on ${hosts[*]}; logs: $DFMSPEC_ATTEMPT_DIR"',
        "",
        "# shellcheck disable=SC2016  # the nodes fill it in",
        "srun --kill-on-bad-exit=1 --wait=60 --cpu-bind=none bash -c '",
        '    node="$DFMSPEC_ATTEMPT_DIR/node$SLURM_NODEID"',
        '    mkdir -p "$node"',
        '    uname -n > "$node/host"',
        "    code=0",
        f'    bash "$1/{script} > "$node/torchrun.log" 2>&1 || code=$?',
        '    echo "$code" > "$node/exit_code"',
        '    exit "$code"',
        "' bash \"$DFMSPEC_BUNDLE\" &",
        "step=$!",
        "again=no",
        "# shellcheck disable=SC2317,SC2329  # the trap calls it",
        "on_signal() {",
        *_ON_SIGNAL["ours" if ours else "upstream" if plan.launcher["time_limit"] is None else "upstream with a limit"],
        "}",
        "trap on_signal USR1",
        "code=0",
        'wait "$step" || code=$?',
        'while kill -0 "$step" 2> /dev/null; do  # the signal ended the wait, not the step',
        "    code=0",
        '    wait "$step" || code=$?',
        "done",
        f"if {again}; then",
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]) + "\n"  # fmt: skip


_ATTEMPT = (
    'if [ -n "${DFMSPEC_ATTEMPT:-}" ]; then',
    "    attempt=$((DFMSPEC_ATTEMPT + ${SLURM_RESTART_COUNT:-0}))",
    "else  # nobody watches: the next attempt of this plan, unless another job is at it",
    '    owner="$(cat "$DFMSPEC_RUN_DIR/slurm_job" 2> /dev/null || true)"',
    '    if [ "${owner:-$SLURM_JOB_ID}" != "$SLURM_JOB_ID" ] && squeue --noheader --jobs="$owner" 2> /dev/null | grep -q .; then',
    '        echo "error: $DFMSPEC_RUN_DIR belongs to job $owner, which has not ended; wait for it, or cancel it" >&2',
    "        exit 5",
    "    fi",
    "    attempt=1",
    '    while [ -e "$DFMSPEC_RUN_DIR/attempts/$attempt" ]; do attempt=$((attempt + 1)); done',
    '    mkdir -p "$DFMSPEC_RUN_DIR"',
    '    echo "$SLURM_JOB_ID" > "$DFMSPEC_RUN_DIR/slurm_job"',
    "fi",
)  # fmt: skip
"""Which attempt of the plan's run the job is: none goes on in the folder of another, whose files would speak for it."""


_SAVES = ('    echo "the time limit is near: the run saves and stops, and is queued again"', "    again=yes")
_ON_SIGNAL = {
    "ours": (*_SAVES, '    echo 10 > "$DFMSPEC_ATTEMPT_DIR/stop"'),
    "upstream with a limit": _SAVES,  # by itself: train.exit_duration_in_mins
    "upstream": (
        '    echo "the job ends soon, and the script knows no time to save at (launcher.time_limit): it is queued again, from its last checkpoint"',
        '    scontrol requeue "$SLURM_JOB_ID"',
    ),
}
"""What a job does when Slurm says that it will end it; requeueing ends it at once."""


def _option(option: str) -> str:
    """An option of sbatch in a #SBATCH line, where quotes are read as the shell's."""
    name, equals, value = option.partition("=")
    return name + equals + (shlex.quote(value) if equals else "")


def _gpu_check(plan: Plan) -> list[str]:
    if not plan.gpus_per_node:
        return []
    return [
        f'if [ "${{SLURM_GPUS_ON_NODE:=0}}" != {plan.gpus_per_node} ]; then',
        f'    echo "error: the plan is for {plan.gpus_per_node} GPUs a node, and the job has $SLURM_GPUS_ON_NODE; submit the script as it is" >&2',
        "    exit 4",
        "fi",
    ]


def launch(plan: Plan, place: Place) -> SlurmJob:
    """Submit the job of a run.

    Raises:
        PreflightError: there is no sbatch, or it refused.
    """
    env = {"DFMSPEC_BUNDLE": place.run_dir, "DFMSPEC_RUN_DIR": place.run_dir, "DFMSPEC_ATTEMPT": str(place.attempt)}
    words = ["--parsable", f"--output={_literal(place.run_dir)}/slurm-%j.log", f"{place.run_dir}/{JOB}"]
    job = _sbatch(words, env).split(";")[0]
    (Path(place.attempt_dir) / _ID).write_text(json.dumps({"job": job}) + "\n")
    place.talk(f"Slurm job {job} is submitted")
    return SlurmJob(job, plan, place, restarts=0)


def attach(plan: Plan, place: Place) -> SlurmJob | None:
    """The job of an earlier attempt, when it still waits or runs.

    Raises:
        PreflightError: Slurm does not answer.
    """
    for begun in sorted(Path(place.run_dir, "attempts").glob(f"*/{_ID}"), key=lambda file: -int(file.parent.name)):
        job, first = json.loads(begun.read_text())["job"], int(begun.parent.name)
        try:
            state, restarts, _ = _ask(job) or ("GONE", 0, "")
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PreflightError(f"Slurm does not answer, and job {job} of this run may still go on: {error}; try again") from error
        if state not in _ENDED:
            place.talk(f"Slurm job {job} goes on: {state}")
            return SlurmJob(job, plan, place._replace(attempt=first + restarts), restarts=restarts)
        return None
    return None


def check(bundle: Path) -> str:
    """What `sbatch --test-only` says of a bundle's job.

    Raises:
        PreflightError: it refuses.
    """
    return _sbatch(["--test-only", str(bundle / JOB)], {})


def _literal(path: str) -> str:
    """A path in --output, where a per cent sign begins a pattern."""
    return path.replace("\\", "\\\\").replace("%", "%%")


def _sbatch(words: list[str], env: dict[str, str]) -> str:
    if shutil.which("sbatch") is None:
        raise PreflightError("sbatch is not installed here; run this on a login node of the cluster, or write the plan with -o and submit job.sbatch there")
    exports = ["env", *(f"{name}={value}" for name, value in env.items())]
    done = subprocess.run(
        ["bash", "-c", f'PATH={programs_path()}:"$PATH" exec "$@"', "bash", *exports, "sbatch", *words],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode:
        raise PreflightError(f"Slurm refuses the job: {(done.stderr or done.stdout).strip()}")
    return (done.stdout or done.stderr).strip()


def _ask(job: str) -> tuple[str, int, str] | None:
    """(state, restarts, reason) of a job; None: Slurm no longer knows it. Raises OSError: Slurm does not answer."""
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=State:32,RestartCnt:12,Reason:80"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(done.stderr.strip())
    words = done.stdout.split()
    return (words[0], int(words[1]), " ".join(words[2:])) if len(words) > 2 else None


class SlurmJob:
    """A job, and the attempt of it that is watched."""

    def __init__(self, job: str, plan: Plan, place: Place, *, restarts: int) -> None:
        self._job, self._plan, self._place, self._restarts = job, plan, place, restarts
        self._state, self._said, self._asked, self._ended_at = "", "", 0.0, 0.0
        self._newer = 0

    @property
    def attempt(self) -> int:
        """The number of the attempt that is watched."""
        return self._place.attempt

    def poll(self) -> list[int | None]:
        """Exit code that each node left; -9: it left none, and the attempt is over."""
        self._look()
        codes = [exit_code_left(Path(self._place.attempt_dir), node) for node in range(self._plan.nnodes)]
        over = self._newer > self._restarts or self._state in _ENDED
        if not over:
            return [None] * len(codes)  # also when every node has ended: the job decides whether it is queued again
        self._ended_at = self._ended_at or time.monotonic()
        if None in codes and self._state == "COMPLETED" and time.monotonic() - self._ended_at < _SECONDS_FOR_THE_LAST_FILES:
            return codes
        return [-signal.SIGKILL if code is None else code for code in codes]

    def _look(self) -> None:
        if time.monotonic() - self._asked < _SECONDS_BETWEEN_QUESTIONS:
            return
        with suppress(OSError, subprocess.TimeoutExpired):  # Slurm is busy; the job does not depend on this question
            self._state, self._newer, reason = _ask(self._job) or ("GONE", self._newer, "")
            said = f"Slurm job {self._job}: {self._state}" + (f" ({reason})" if self._state in _WAITING and reason != "None" else "")
            if said != self._said:
                self._place.talk(said)
            self._said = said
        self._asked = time.monotonic()

    def again(self) -> bool:
        """Whether Slurm has taken the job up once more."""
        if self._newer == self._restarts:
            return False
        self._place = self._place._replace(attempt=self._place.attempt + self._newer - self._restarts)
        self._restarts, self._ended_at = self._newer, 0.0
        return True

    def stop(self, number: int) -> None:
        """Ask the ranks to save and stop; a job that still waits has nothing to save."""
        if self._state in _WAITING:
            self.kill()
        else:
            ask_to_stop(self._place.attempt_dir, number)

    def kill(self) -> None:
        """Cancel the job, if it has not ended."""
        if self._state not in _ENDED:
            subprocess.run(["scancel", self._job], capture_output=True, check=False)

    def described(self) -> list[tuple[str, list[str], list[str]]]:
        """(host, argv, names of the variables set) of each node: Slurm chooses the hosts."""
        return [(f"slurm job {self._job}", ["sbatch", f"{self._place.run_dir}/{JOB}"], []) for _ in range(self._plan.nnodes)]

    def last_word(self) -> str:
        """The state in which the job ended."""
        return f"Slurm job {self._job}: {self._state}"
