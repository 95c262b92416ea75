"""Launcher slurm: a job script that stands alone, and a watcher of the job.

The script gives every node its script by `srun`, refuses an allocation that is not the plan's, and before the time
limit asks the run to save and queues the job again: the next attempt goes on from there. The run directory is on a file
system that all nodes share.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from dfmspec.errors import PreflightError
from dfmspec.files import write_aside
from dfmspec.plan.containers import INSIDE, srun_words
from dfmspec.plan.plan import Plan
from dfmspec.plan.scripts import MASTER_PORT, SCRIPT_A_NODE, stops_by, where
from dfmspec.record.files import read_json
from dfmspec.record.run_dir import ATTEMPTS, EVENTS, EXIT_CODE, HOST, SLURM_JOB, STOP, TORCHRUN_LOG
from dfmspec.record.verdict import exit_code_left
from dfmspec.run.launch import Place, of_the_run, tell_namesakes
from dfmspec.run.launch.remote import ask_to_stop, programs_path
from dfmspec.targets import target_module

OUTLIVES = True
RUNS_SCRIPTS = True
JOB = "job.sbatch"
_SECONDS_BETWEEN_QUESTIONS = 2.0
_SECONDS_FOR_THE_LAST_FILES = 10.0
_VARIABLES = {"time": "SBATCH_TIMELIMIT"}
"""The variable of an option of sbatch, where it is not named as the option is."""
_MAKES_ANOTHER_JOB = ("SBATCH_ARRAY_INX", "SBATCH_EXPORT", "SBATCH_NO_REQUEUE", "SBATCH_WAIT")
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "CONFIGURING", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_GONE = "GONE"
"""Our own word for the state of a job that Slurm no longer knows."""
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
    _GONE,
}
"""Every other state, also one of a later Slurm, is one of a job that goes on."""


def files(plan: Plan) -> dict[str, str]:
    """job.sbatch."""
    return {JOB: job_script(plan)}


def job_script(plan: Plan) -> str:
    """The text of the job: `sbatch job.sbatch` from the bundle, without dfmspec; or `dfmspec run` submits it.

    The template beside this file says what it does; its holes are `@NAME@`.
    """
    holes = {
        "NAME": plan.name,
        "PLAN": plan.short_id,
        "NODES": str(plan.nnodes),
        "OPTIONS": "\n".join(f"#SBATCH {_option(option)}" for option in _options(plan)),
        "CHECK_GPUS": _check_gpus(plan),
        "FOLDERS": "\n".join(where(plan, "$SLURM_SUBMIT_DIR")),
        "RENDEZVOUS": _SEVERAL_NODES if plan.nnodes > 1 else _ONE_NODE,
        "SCRIPT": _SHARED_SCRIPT if plan.nnodes > SCRIPT_A_NODE else _OWN_SCRIPT,
        "ON_SIGNAL": _on_signal(plan),
        "CONTAINER": _container(plan),
        "INSIDE": _around_the_container(plan),
        "AGAIN": _again(plan),
        "ATTEMPTS": ATTEMPTS,
        "EXIT_CODE": EXIT_CODE,
        "HOST": HOST,
        "SLURM_JOB": SLURM_JOB,
        "TORCHRUN_LOG": TORCHRUN_LOG,
    }
    template = (Path(__file__).parent / JOB).read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@\n?", lambda hole: _filled(holes[hole[1]], hole[0]), template)


def _filled(text: str, hole: str) -> str:
    """The text of a hole; a line that is left with nothing is no line."""
    if hole.endswith("\n") and text:
        return f"{text}\n"
    return text


_ADDRESS = r'''MASTER_ADDR="$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"'''
_SEVERAL_NODES = f'{_ADDRESS}\nexport MASTER_ADDR MASTER_PORT="$port"'
_ONE_NODE = f'export {MASTER_PORT}="$port"'
_OWN_SCRIPT = 'node$SLURM_NODEID.sh"'
_SHARED_SCRIPT = 'node.sh" "$SLURM_NODEID"'
"""The script of a node, after the folder of the bundle and inside its quotes."""


def _options(plan: Plan) -> list[str]:
    """What the job asks of Slurm: the plan's own options, then the user's."""
    launcher = plan.launcher
    options = [f"--job-name={plan.name}", f"--nodes={plan.nnodes}", "--ntasks-per-node=1"]
    if plan.gpus_per_node:
        options.append(f"--gpus-per-node={plan.gpus_per_node}")
    for key in ("partition", "account", "qos"):
        value = launcher[key]
        if value is not None:
            options.append(f"--{key}={value}")
    time_limit = launcher["time_limit"]
    if time_limit is not None:
        options.append(f"--time={time_limit}")

    # Before the time limit the script itself is signalled (B), and the job is queued again with its log kept.
    stop_before = launcher["stop_before"]
    options += ["--requeue", "--open-mode=append", f"--signal=B:USR1@{stop_before}"]
    return [*options, *launcher["sbatch_options"]]


def _option(option: str) -> str:
    """An option of sbatch in a #SBATCH line, where quotes are read as the shell's."""
    name, equals, value = option.partition("=")
    if not equals:
        return name
    return f"{name}=" + shlex.quote(value)


def _check_gpus(plan: Plan) -> str:
    """What a job does first: it refuses an allocation of another number of GPUs."""
    if not plan.gpus_per_node:
        return ""
    count = plan.gpus_per_node
    error = (
        f"error: the plan is for {count} GPUs a node, and the job has $SLURM_GPUS_ON_NODE; submit the script as it is"
    )
    lines = [
        f'if [ "${{SLURM_GPUS_ON_NODE:=0}}" != {count} ]; then',
        f'    echo "{error}" >&2',
        "    exit 4",
        "fi",
    ]
    return "\n".join(lines)


def _on_signal(plan: Plan) -> str:
    """What a job does when Slurm says that it will end it; requeueing ends it at once."""
    stopping = signal.SIGUSR1.value if target_module(plan.target).OWN else stops_by(plan)
    if stopping is None and plan.config["train"].get("exit_duration_in_mins") is None:
        return (
            '    echo "the job ends soon, and the script heeds neither signal nor clock (train.exit_signal_handler): '
            'it is queued again, from its last checkpoint"\n'
            '    scontrol requeue "$SLURM_JOB_ID"'
        )
    lines = [
        '    echo "the time limit is near: the run saves and stops, and is queued again"',
        "    again=yes",
    ]

    # Rank 0 is asked to stop; a script without a handler of signals stops by its clock: train.exit_duration_in_mins.
    if stopping is not None:
        lines.append(f'    echo {stopping} > "$DFMSPEC_ATTEMPT_DIR/{STOP}"')
    return "\n".join(lines)


def _around_the_container(plan: Plan) -> str:
    """What a job does before pyxis enters a container: the scripts of the nodes find themselves in it already."""
    if not srun_words(plan):
        return ""
    setup = ["set +u", *plan.launcher["setup"], "set -u"] if plan.launcher["setup"] else []
    return "\n".join([*setup, f"export {INSIDE}=1  # pyxis enters the container"])


def _container(plan: Plan) -> str:
    """What stands between srun and its command, where pyxis enters a container."""
    words = srun_words(plan)
    if not words:
        return ""
    return " ".join(["", *words])


def _again(plan: Plan) -> str:
    """When the job is queued once more: it was stopped, ended well, and has not finished."""
    stopped = '[ "$again" = yes ] && [ "$code" = 0 ]'
    if not target_module(plan.target).OWN:
        return stopped
    return f"""{stopped} && ! tail -n 1 "$DFMSPEC_RUN_DIR/{EVENTS}" | grep -q '"type": "finished"'"""


def launch(plan: Plan, place: Place) -> SlurmJob:
    """Submit the job of a run.

    Raises:
        PreflightError: there is no sbatch, or it refused.
    """
    tell_namesakes(place)
    run_dir = str(place.run.path)
    env = {
        "DFMSPEC_BUNDLE": run_dir,
        "DFMSPEC_RUN_DIR": run_dir,
        "DFMSPEC_ATTEMPT": str(place.attempt),
        **of_the_run(plan, place),
    }
    output = _literal(run_dir) + "/slurm-%j.log"
    answer = _sbatch(["--parsable", f"--output={output}", f"{run_dir}/{JOB}"], env)
    job, _, _ = answer.partition(";")  # the name of the cluster may follow
    try:
        write_aside(place.attempt_dir.slurm, json.dumps({"job": job}) + "\n")
    except OSError:  # nobody would know of it
        subprocess.run(["scancel", job], capture_output=True, check=False)
        raise
    place.talk(f"Slurm job {job} is submitted")
    return SlurmJob(job, plan, place, restarts=0)


def attach(plan: Plan, place: Place) -> SlurmJob | None:
    """The job of an earlier attempt, when it still waits or runs.

    Raises:
        PreflightError: Slurm does not answer.
    """
    for first in reversed(place.run.begun_attempts()):
        begun = place.run.attempt(first).slurm
        if first >= place.attempt or not begun.exists():
            continue

        # The newest job of the run is the only one that may still go on.
        job = _job_in(begun)
        try:
            state, restarts, _ = _ask(job) or (_GONE, 0, "")
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PreflightError(
                f"Slurm does not answer, and job {job} of this run may still go on: {error}; try again"
            ) from error
        if state in _ENDED:
            return None
        place.talk(f"Slurm job {job} goes on: {state}")
        return SlurmJob(job, plan, place._replace(attempt=first + restarts), restarts=restarts)
    return None


def _job_in(begun: Path) -> str:
    """The job of an attempt, by the file that its submission left.

    Raises:
        PreflightError: it cannot be read.
    """
    try:
        job = read_json(begun)["job"]
    except (OSError, ValueError, KeyError) as error:
        raise PreflightError(
            f"{begun} cannot be read ({error}), and its job may still go on; "
            "see squeue, cancel that job if there is one, and remove the file"
        ) from error
    return str(job)


def check(bundle: Path) -> str:
    """What `sbatch --test-only` says of a bundle's job.

    Raises:
        PreflightError: it refuses.
    """
    return _sbatch(["--test-only", str(bundle / JOB)], {})


def _literal(path: str) -> str:
    """A path in --output, where a per cent sign begins a pattern."""
    return path.replace("\\", "\\\\").replace("%", "%%")


def _overriding(job: Path) -> list[str]:
    """The variables that sbatch would take over an option of a job's script, or that would make another job of it."""
    options = re.findall(r"(?m)^#SBATCH --([a-z-]+)", job.read_text(encoding="utf-8"))
    names = {_VARIABLES.get(option) or "SBATCH_" + option.upper().replace("-", "_") for option in options}
    return sorted({*names, *_MAKES_ANOTHER_JOB})


def _sbatch(words: list[str], env: dict[str, str]) -> str:
    """What sbatch answers; this dfmspec's torchrun is first on the PATH that the job inherits.

    Args:
        words: options, and the job's script last.
        env: what the job must know beside the script.

    Raises:
        PreflightError: there is no sbatch, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise PreflightError(
            "sbatch is not installed here; run this on a login node of the cluster, "
            "or write the plan with -o and submit job.sbatch there"
        )
    programs = programs_path()
    exports = [f"--unset={name}" for name in _overriding(Path(words[-1]))]
    exports += [f"{name}={value}" for name, value in env.items()]
    done = subprocess.run(
        ["bash", "-c", f'PATH={programs}:"$PATH" exec "$@"', "bash", "env", *exports, "sbatch", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise PreflightError(f"Slurm refuses the job: {said}")
    return (done.stdout or done.stderr).strip()


def _ask(job: str) -> tuple[str, int, str] | None:
    """(state, restarts, reason) of a job; None: Slurm no longer knows it.

    Raises:
        OSError: Slurm does not answer.
    """
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=State:32,RestartCnt:12,Reason:80"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        raise OSError(done.stderr.strip())
    words = done.stdout.split()
    if len(words) < 3:
        return None
    return words[0], int(words[1]), " ".join(words[2:])


class SlurmJob:
    """A job, and the attempt of it that is watched."""

    def __init__(self, job: str, plan: Plan, place: Place, *, restarts: int) -> None:
        self._job = job
        self._plan = plan
        self._place = place
        self._restarts = restarts
        self._newer = 0
        """How often Slurm has started the job again, as it says.

        More than `_restarts`: the attempt that is watched is over.
        """
        self._state = ""
        self._said = ""
        self._asked = 0.0
        self._ended_at = 0.0

    @property
    def attempt(self) -> int:
        """The number of the attempt that is watched."""
        return self._place.attempt

    def poll(self) -> list[int | None]:
        """Exit code that each node left; -9: it left none, and the attempt is over."""
        self._look()
        codes = [exit_code_left(self._place.attempt_dir, node) for node in range(self._plan.nnodes)]

        # While the job goes on, so does the attempt, even when every node has ended: it may be queued again.
        is_over = self._newer > self._restarts or self._state in _ENDED
        if not is_over:
            return [None] * len(codes)

        # The last files may come a moment after the word that the job has ended.
        self._ended_at = self._ended_at or time.monotonic()
        is_early = time.monotonic() - self._ended_at < _SECONDS_FOR_THE_LAST_FILES
        if None in codes and self._state == "COMPLETED" and is_early:
            return codes
        return [-signal.SIGKILL if code is None else code for code in codes]

    def _look(self) -> None:
        """Ask Slurm for the state of the job, when the last answer is old; tell what is new."""
        if time.monotonic() - self._asked < _SECONDS_BETWEEN_QUESTIONS:
            return

        # Slurm may be busy; the job does not depend on this question.
        with suppress(OSError, subprocess.TimeoutExpired):
            self._state, self._newer, reason = _ask(self._job) or (_GONE, self._newer, "")
            said = f"Slurm job {self._job}: {self._state}"
            if self._state in _WAITING and reason != "None":
                said += f" ({reason})"
            if said != self._said:
                self._place.talk(said)
            self._said = said
        self._asked = time.monotonic()

    def again(self) -> bool:
        """Whether Slurm has taken the job up once more."""
        if self._newer == self._restarts:
            return False
        self._place = self._place._replace(attempt=self._place.attempt + self._newer - self._restarts)
        self._restarts = self._newer
        self._ended_at = 0.0
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
        argv = ["sbatch", f"{self._place.run.path}/{JOB}"]
        return [(f"slurm job {self._job}", argv, []) for _ in range(self._plan.nnodes)]

    def last_word(self) -> str:
        """The state in which the job ended."""
        return f"Slurm job {self._job}: {self._state}"
