"""Launcher local: every node of the plan is a torchrun on this machine; several nodes only for trials."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from string import Template
from typing import IO, TYPE_CHECKING

from dfmspec.errors import PreflightError
from dfmspec.plan.containers import container_name, engine_of
from dfmspec.plan.environment import inherited, patience
from dfmspec.plan.plan import Plan, Role, Word
from dfmspec.plan.scripts import MASTER_PORT, handler, script_of, torchrun_words
from dfmspec.processes import die_with_parent
from dfmspec.record.run_dir import NodeDir
from dfmspec.resources import resource
from dfmspec.run.launch import Place, of_the_run, tell_namesakes
from dfmspec.run.launch.remote import ask_to_stop
from dfmspec.run.preflight import RANK_FILE, environment_here, path_here, root_here
from dfmspec.run.secrets import filled_in
from dfmspec.spec.containers import ENGINES
from dfmspec.spec.paths import PLAN_ID
from dfmspec.targets import CONFIG, target_module

if TYPE_CHECKING:
    import psutil

_ATTEMPT = "DFMSPEC_ATTEMPT_DIR"
_SECONDS_TO_END = 10.0
_SECONDS_TO_SAVE = 180.0
"""As long as torchrun waits for its ranks, and some."""

OUTLIVES = False
RUNS_SCRIPTS = False
check = None


def files(plan: Plan) -> dict[str, str]:
    """None: the scripts of the nodes are all."""
    return {}


def attach(plan: Plan, place: Place) -> None:
    """None: the processes end with their supervisor. Those that still do are waited for, since they may save."""
    _wait_for_earlier(place)


def launch(plan: Plan, place: Place) -> LocalRun:
    """Start one torchrun a node.

    Raises:
        PreflightError: there is no torchrun.
    """
    tell_namesakes(place)
    env = _environment(plan, place)
    engine = engine_of(plan)
    if engine is None:  # whose script fills them in
        env |= filled_in(plan.secrets)
    run = LocalRun(place, inherited(os.environ, nnodes=plan.nnodes), engine)
    for node in range(plan.nnodes):
        argv = _entering(plan, place, node) if engine else _commanded(plan, place, node, env)
        folder = place.attempt_dir.node(node)
        folder.path.mkdir(parents=True, exist_ok=True)
        run.start(argv, env, folder)
    return run


def _wait_for_earlier(place: Place) -> None:
    """Let processes of an earlier attempt, whose supervisor is gone, save and end; those that do not are ended."""
    import psutil

    earlier = _processes_of(place.run.attempts)
    if not earlier:
        return
    place.talk(f"[INFO] {len(earlier)} processes of an earlier attempt still save and end; they are waited for")
    _, alive = psutil.wait_procs(earlier, timeout=_SECONDS_TO_SAVE)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=_SECONDS_TO_END)


def _processes_of(attempts: Path) -> list[psutil.Process]:
    """The processes that live and have an attempt of some folder in their environment."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            attempt = process.environ().get(_ATTEMPT, "")
            if Path(attempt).is_relative_to(attempts) and _lives(process):
                found.append(process)
    return found


def _entering(plan: Plan, place: Place, node: int) -> list[str]:
    """The script of a node, which enters its container by itself."""
    script, *words = script_of(plan, node)
    return ["bash", f"{place.run.path}/{script}", *words]


def _commanded(plan: Plan, place: Place, node: int, env: Mapping[str, str | None]) -> list[str]:
    """The plan's command as this machine needs it, after launcher.setup."""
    places = {
        Role.PROGRAM: torchrun_words(plan, _torchrun(plan)),
        Role.SCRIPT: _script(plan),
        Role.CONFIG: [str(place.run.path / CONFIG)],
    }
    argv = [each for word in plan.words(node) for each in _arguments(word, plan, env, places)]
    return _after_setup(plan, argv)


def _torchrun(plan: Plan) -> str:
    """This dfmspec's torchrun, or the one on PATH; after launcher.setup, the one that is there then.

    Raises:
        PreflightError: there is none.
    """
    if plan.launcher["setup"]:
        return "torchrun"
    beside = Path(sys.executable).with_name("torchrun")
    if beside.exists():
        return str(beside)
    found = shutil.which("torchrun")
    if found is None and plan.launcher.get("python") is None:
        raise PreflightError("torchrun is not installed; run: pip install 'dfmspec[train]', or set launcher.python")
    return found or "torchrun"


def _script(plan: Plan) -> list[str]:
    """The script, and before one that knows nothing of a supervisor what stands between."""
    entry = target_module(plan.target).ENTRY
    root = root_here(plan)
    return [str(resource(entry))] if root is None else [str(RANK_FILE), f"{root}/{entry}"]


def _environment(plan: Plan, place: Place) -> dict[str, str | None]:
    """The plan's variables, and where the run is and its nodes meet; None: torchrun must not have it."""
    port = str(free_port())
    env: dict[str, str | None] = {**environment_here(plan), **patience(plan.env)}
    env["DFMSPEC_RUN_DIR"] = str(place.run.path)
    env[PLAN_ID] = plan.recorded_id
    env[_ATTEMPT] = str(place.attempt_dir.path)
    env |= handler(plan) | of_the_run(plan, place)
    env["TQDM_DISABLE"] = "1"
    env["PATH"] = path_here()
    if plan.nnodes > 1:
        env["MASTER_ADDR"] = "127.0.0.1"
        env["MASTER_PORT"] = port
        env["DFMSPEC_RDZV_ID"] = f"{place.run.path.name}.{place.attempt}"
    else:
        # Torchrun's own is always 29500, which another run may have.
        env["PET_MASTER_ADDR"] = "127.0.0.1"
        env["PET_MASTER_PORT"] = port
        env[MASTER_PORT] = port  # for a script, which takes no PET_*
    return env


def _arguments(word: Word, plan: Plan, env: Mapping[str, object], places: Mapping[Role, list[str]]) -> list[str]:
    """A word of the plan's command as this machine needs it."""
    if word.role is Role.VARIABLE:
        return [Template(word.text).substitute(env)]
    if word.role is Role.PATH:
        return [plan.located(word.text)]
    return places.get(word.role, [word.text])


def _after_setup(plan: Plan, argv: list[str]) -> list[str]:
    """A command that runs after the lines of launcher.setup, where there are any."""
    if not plan.launcher["setup"]:
        return argv
    script = "\n".join(["set -eo pipefail", *plan.launcher["setup"], 'exec "$@"'])
    return ["bash", "-c", script, "bash", *argv]


def free_port() -> int:
    """A port that nobody uses at this moment; it is taken seconds later.

    It lies below those that systems give out by themselves, and below torchrun's own.

    Raises:
        PreflightError: of fifty ports, none is free.
    """
    for port in random.sample(range(20000, 29500), 50):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise PreflightError("fifty ports of this machine between 20000 and 29500 are in use; end what holds them")


class LocalRun:
    """The torchrun processes of a run on this machine."""

    def __init__(self, place: Place, around: Mapping[str, str], engine: str | None = None) -> None:
        """What is started.

        Args:
            place: where the run is.
            around: the variables that each torchrun has beside those of its own.
            engine: what runs it in containers; None: it is in none.
        """
        self._place = place
        self._engine = engine
        self.attempt = place.attempt
        self._attempt_dir = str(place.attempt_dir.path)
        self._around = around
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folders: list[NodeDir] = []
        self._logs: list[IO[bytes]] = []
        self._described: list[tuple[str, list[str], list[str]]] = []

    def start(self, argv: list[str], env: Mapping[str, str | None], folder: NodeDir) -> None:
        """One node's torchrun; it dies when this process does."""
        log = folder.torchrun_log.open("wb")
        merged = {**self._around, **env}
        process = subprocess.Popen(
            argv,
            env={name: value for name, value in merged.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509  one thread here
        )
        self._processes.append(process)
        self._folders.append(folder)
        self._logs.append(log)
        self._described.append((socket.gethostname(), argv, sorted(env)))

    def described(self) -> list[tuple[str, list[str], list[str]]]:
        """(host, argv, names of the variables set) of each node."""
        return self._described

    def poll(self) -> list[int | None]:
        """Exit code of each node's torchrun; None while it runs. Ranks that a killed one left behind are ended."""
        codes = [process.poll() for process in self._processes]
        if any(code is not None and code < 0 for code in codes):
            self.kill()
        return codes

    def again(self) -> bool:
        """Nobody starts it again."""
        return False

    def last_word(self) -> str:
        """Nothing beyond the logs."""
        return ""

    def stop(self, number: int) -> None:
        """Signal the ranks themselves: they finish the iteration, save, and let torchrun end well.

        Before any rank is there, torchrun is asked to end.
        """
        ranks = self._ranks()
        if ranks and self._engine is not None:  # whose processes have numbers of their own
            ask_to_stop(self._place.attempt_dir, number)
            return
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, number)
        if not ranks:
            for process in self._processes:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)

    def _ranks(self) -> list[int]:
        """The process ids that ranks have left."""
        found = []
        for folder in self._folders:
            found += folder.pids()
        return found

    def kill(self) -> None:
        """End every process of the run, and those that they started."""
        import psutil

        self._kill_containers()

        # Again, until none is left: one may have been starting others.
        deadline = time.monotonic() + _SECONDS_TO_END
        while time.monotonic() < deadline:
            family = self._family()
            if not family:
                break
            for member in family:
                with suppress(psutil.Error):
                    member.kill()
            psutil.wait_procs(family, timeout=1)
        for log in self._logs:
            log.close()

    def _kill_containers(self) -> None:
        """End the containers that go on when the process that started them is gone."""
        if self._engine is None or not ENGINES[self._engine].bears_a_name:
            return
        if all((process.poll() or 0) >= 0 and process.poll() is not None for process in self._processes):
            return  # they have ended by themselves
        for node in range(len(self._processes)):
            name = container_name(self._place.run.path.name, node)
            with suppress(OSError):
                subprocess.run([self._engine, "kill", name], capture_output=True, check=False)

    def _family(self) -> list[psutil.Process]:
        """Every process of the run that is alive, whoever its parent is by now."""
        import psutil

        # Each torchrun, and what it has started.
        found: dict[int, psutil.Process] = {}
        for process in self._processes:
            with suppress(psutil.Error):
                parent = psutil.Process(process.pid)
                found |= {member.pid: member for member in (*parent.children(recursive=True), parent)}

        # Those of a torchrun that is gone have the attempt in their environment.
        found |= {other.pid: other for other in _processes_of(Path(self._attempt_dir))}
        return [member for member in found.values() if _lives(member)]


def _lives(process: psutil.Process) -> bool:
    """Whether a process is more than an entry that its parent has not read yet."""
    import psutil

    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
