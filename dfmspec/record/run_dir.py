"""The layout of a run directory: every name in it, in one place.

runs/<name>/<run-id>/
  spec.yaml source.patch plan.json config.yaml manifest.json events.jsonl
  attempts/<n>/node<i>/rank<r>/{stdout,stderr,pid,error.json}
  checkpoints/ tensorboard/ samples/
runs/<name>/latest -> <run-id>
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

LATEST = "latest"
"""Beside the runs of a name: a link to the newest."""
LOCK = ".lock"
OWNER = ".owner.json"

ATTEMPTS = "attempts"
EVENTS = "events.jsonl"
PATCH = "source.patch"
SLURM_JOB = "slurm_job"
"""The job that a run belongs to which nobody watches."""

STOP = "stop"
"""In the folder of an attempt; it holds the number of the signal that it stands for."""
TORCHRUN_LOG = "torchrun.log"
EXIT_CODE = "exit_code"
HOST = "host"
ANSWER = "preflight.json"
"""What a node found before it started anything."""


class RankDir(NamedTuple):
    """What one rank leaves of an attempt."""

    path: Path

    @property
    def stdout(self) -> Path:
        """What it printed."""
        return self.path / "stdout"

    @property
    def stderr(self) -> Path:
        """What it printed on the error stream."""
        return self.path / "stderr"

    @property
    def pid(self) -> Path:
        """Its process id."""
        return self.path / "pid"

    @property
    def error(self) -> Path:
        """The error that ended it."""
        return self.path / "error.json"


class NodeDir(NamedTuple):
    """What one node leaves of an attempt."""

    path: Path

    @property
    def torchrun_log(self) -> Path:
        """What torchrun printed."""
        return self.path / TORCHRUN_LOG

    @property
    def ssh_log(self) -> Path:
        """What ssh said of the connection."""
        return self.path / "ssh.log"

    @property
    def start_script(self) -> Path:
        """What a machine of its own runs."""
        return self.path / "start.sh"

    @property
    def exit_code(self) -> Path:
        """What torchrun ended with, where a scheduler's job wrote it down."""
        return self.path / EXIT_CODE

    @property
    def host(self) -> Path:
        """The machine, where a scheduler chose it."""
        return self.path / HOST

    def pids(self) -> list[int]:
        """The process ids that ranks have left here."""
        texts = [pid.read_text(errors="replace") for pid in self.path.glob("rank*/pid")]
        return [int(text) for text in texts if _is_number(text)]

    def rank(self, rank: int) -> RankDir:
        """The folder of a rank, by its number in the whole run."""
        return RankDir(self.path / f"rank{rank}")


_MOST_ATTEMPTS = 1_000_000
"""A folder with a higher number is no attempt of a run, but a date or an id."""


def _is_attempt(name: str) -> bool:
    return _is_number(name) and 0 < int(name) < _MOST_ATTEMPTS


class AttemptDir(NamedTuple):
    """What one start of the run leaves."""

    path: Path

    @property
    def stop(self) -> Path:
        """The file that asks the ranks to save and stop."""
        return self.path / STOP

    @property
    def slurm(self) -> Path:
        """The job of an attempt that was submitted."""
        return self.path / "slurm.json"

    def node(self, node: int) -> NodeDir:
        """The folder of a node, by its rank."""
        return NodeDir(self.path / f"node{node}")

    def answers(self) -> list[tuple[int, Path]]:
        """(node, what it found before it started anything) of every node that looked."""
        return sorted((_number(path.parent), path) for path in self.path.glob(f"node*/{ANSWER}"))

    def torchrun_logs(self) -> list[tuple[int, Path]]:
        """(node, log) of every node that left one, in order."""
        return sorted((_number(log.parent), log) for log in self.path.glob(f"node*/{TORCHRUN_LOG}"))

    def errors(self) -> list[tuple[int, Path]]:
        """(node, file) of every rank that left an error."""
        return [(_number(path.parent.parent), path) for path in self.path.glob("node*/rank*/error.json")]


def _number(node: Path) -> int:
    """3 of `node3`; -1 of any other name, which no run gives."""
    digits = node.name.removeprefix("node")
    return int(digits) if _is_number(digits) else -1


def _is_number(text: str) -> bool:
    """Whether a text is a number as a run writes it: ASCII digits, few, and no zeros before them."""
    return re.fullmatch("0|[1-9][0-9]{0,8}", text) is not None


class RunDir(NamedTuple):
    """A run directory; a path itself, for whoever prints or opens it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def manifest(self) -> Path:
        """The record of the run."""
        return self.path / "manifest.json"

    @property
    def events(self) -> Path:
        """What rank 0 tells while it trains, one JSON object a line."""
        return self.path / EVENTS

    @property
    def spec(self) -> Path:
        """The spec as it was written."""
        return self.path / "spec.yaml"

    @property
    def patch(self) -> Path:
        """What was not committed where the spec lies."""
        return self.path / PATCH

    @property
    def plan(self) -> Path:
        """What it was compiled to."""
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go, unless checkpoint.save names another folder."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Pictures that were sampled."""
        return self.path / "samples"

    @property
    def attempts(self) -> Path:
        """The folder of all attempts."""
        return self.path / ATTEMPTS

    def attempt(self, number: int) -> AttemptDir:
        """The folder of an attempt."""
        return AttemptDir(self.attempts / str(number))

    def begun_attempts(self) -> list[int]:
        """The numbers of all attempts that were ever begun, recorded or not, in order; other names are none."""
        return sorted(int(path.name) for path in self.attempts.glob("*") if _is_attempt(path.name))

    def next_attempt(self, recorded: Iterable[int] = ()) -> int:
        """One more than any attempt that was ever begun, or is `recorded`: a folder may be lost."""
        return 1 + max([*self.begun_attempts(), *recorded], default=0)
