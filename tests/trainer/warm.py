"""A process that has imported torch and megatron-core once, and forks trainings.

Each starts at once, where a new interpreter takes seconds.

`python -m tests.trainer.warm` reads one JSON object a line, and answers each with the process id of what it forked.
When that ends, its exit code is in the file that the request named. Nothing but the imports is shared: each training
has its own environment, working directory, output files and process group.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from dfmspec.run.launch.local import free_port
from tests.conftest import ROOT, environment

_OWN = ("DFMSPEC_", "PET_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""Variables read while a training runs; any other may have been read at an import, and asks for a new interpreter."""


def may_be_forked(env: dict[str, str]) -> bool:
    """Whether a training with these variables can start from what is imported already."""
    return all(name.startswith(_OWN) for name in env)


class Forked:
    """A training that was forked, as a `subprocess.Popen` shows it."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._folder = folder

    def poll(self) -> int | None:
        """The exit code; None while it runs; negative: killed by that signal."""
        file = self._folder / "exit"
        if self.returncode is None and file.exists():
            self.returncode = int(file.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            code = self.poll()
            if code is not None:
                return code
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked training", timeout or 0)
            time.sleep(0.01)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed, once it has ended."""
        self.wait(timeout)
        return (self._folder / "stdout").read_text(), (self._folder / "stderr").read_text()

    def send_signal(self, number: int) -> None:
        """Signal the process, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it now."""
        self.send_signal(signal.SIGKILL)


class ForkedRanks:
    """The ranks of one training on this machine."""

    def __init__(self, ranks: list[Forked]) -> None:
        self._ranks = ranks

    def finish(self, seconds: float) -> tuple[int, str, str]:
        """(exit code, what rank 0 printed, what all wrote to stderr).

        Where one fails, the others end with it, as torchrun has it.
        """
        deadline = time.monotonic() + seconds
        while True:
            codes = [rank.poll() for rank in self._ranks]
            if None not in codes or any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for rank in self._ranks:
            rank.kill()
        said = [rank.communicate(timeout=10) for rank in self._ranks]
        failed = [code for code in codes if code] or [1 for code in codes if code is None]
        return (failed or [0])[0], said[0][0], "".join(err for _, err in said)


class Warm:
    """The process that forks, started when it is first asked."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def start(self, script: Path, words: Sequence[str], *, cwd: Path, env: dict[str, str]) -> Forked:
        """Run a script in a fork, with `env` over the environment of tests."""
        if self._server is None or self._server.poll() is not None:
            command = [sys.executable, "-m", "tests.trainer.warm"]
            self._server = subprocess.Popen(
                command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        folder = Path(mkdtemp(prefix="dfmspec-warm-"))
        request = {"folder": str(folder), "cwd": str(cwd), "env": environment(**env), "argv": [str(script), *words]}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Forked(int(self._server.stdout.readline()), folder)

    def start_ranks(
        self, script: Path, words: Sequence[str], processes: int, *, cwd: Path, env: dict[str, str]
    ) -> ForkedRanks:
        """Run a script on several ranks, with the variables that torchrun gives them."""
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GROUP_RANK": "0"}
        size = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(self.start(script, words, cwd=cwd, env=env | meeting | size | own))
        return ForkedRanks(ranks)


WARM = Warm()


def serve() -> None:
    """Fork what is asked for, until nobody asks any more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _import()
    running: dict[int, str] = {}
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.01 if running else None)
        _collect(running)
        if not ready:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(request)
        running[pid] = request["folder"]
        answers.write(f"{pid}\n")
        answers.flush()
    for pid in running:
        os.killpg(pid, signal.SIGKILL)


def _import() -> None:
    import megatron.core
    import megatron.energon
    import torch

    import dfmspec.entry
    import dfmspec.trainer.loop
    import dfmspec.trainer.prepare.writer

    del megatron, torch, dfmspec


def _collect(running: dict[int, str]) -> None:
    """Write down the exit codes of those that have ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            folder = Path(running.pop(pid))
            aside = folder / "exit.tmp"
            aside.write_text(str(os.waitstatus_to_exitcode(status)))
            aside.rename(folder / "exit")


def _run(request: dict[str, Any]) -> None:
    """Be the training that was asked for; never returns."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, stream in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{request['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = request["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
