"""How a plan's processes are started: a module a launcher, all of one protocol."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dfmspec.namesakes import told
from dfmspec.plan.containers import START
from dfmspec.plan.plan import Plan
from dfmspec.record.run_dir import AttemptDir, RunDir
from dfmspec.spec.launchers import LAUNCHERS


class Place(NamedTuple):
    """Where a run is, and who listens."""

    run: RunDir
    """With the plan's files in it: config.yaml, the scripts of the nodes, the launcher's own."""
    attempt: int
    talk: Callable[[str], None]
    """Where news of a scheduler go."""
    start: str = ""
    """The folder of a checkpoint that the run goes on from, beside its own; "": none."""

    @property
    def attempt_dir(self) -> AttemptDir:
        """The folder of the attempt."""
        return self.run.attempt(self.attempt)


def tell_namesakes(place: Place) -> None:
    """Name the files on PYTHONPATH that every rank would import in place of a package, where it inherits PYTHONPATH."""
    line = told(os.environ.get("PYTHONPATH", ""))
    if line:
        place.talk(f"[WARNING] {line}")


def of_the_run(plan: Plan, place: Place) -> dict[str, str]:
    """Variables of a run: its id at Weights & Biases, where it is logged there, and what is mounted to start from."""
    found = {}
    if "WANDB_RESUME" in plan.env and "WANDB_RUN_ID" not in plan.env:
        found["WANDB_RUN_ID"] = f"{plan.name}-{place.run.path.name}"
    if place.start:
        found[START] = place.start
    return found


class Handle(Protocol):
    """Processes that were started, one torchrun a node."""

    @property
    def attempt(self) -> int:
        """The number of the attempt that runs."""

    def poll(self) -> list[int | None]:
        """Exit code of each node's torchrun; None while it runs, or waits to."""

    def stop(self, number: int) -> None:
        """Ask the ranks to save and stop."""

    def kill(self) -> None:
        """End everything, now."""

    def described(self) -> list[tuple[str, list[str], list[str]]]:
        """(host, argv, names of the variables set) of each node."""

    def again(self) -> bool:
        """Whether a scheduler starts the next attempt after one has ended; the handle is that one's from now on."""

    def last_word(self) -> str:
        """What a scheduler said of the end; empty when there is none."""


class Launcher(Protocol):
    """What a module of this package offers."""

    OUTLIVES: bool
    """Whether what it starts goes on without this process."""
    RUNS_SCRIPTS: bool
    """Whether it runs the scripts of a bundle, which the run directory must then hold."""
    check: Callable[[Path], str] | None
    """Asks the scheduler whether it would take a bundle's job; None: it has none to ask."""

    def files(self, plan: Plan) -> dict[str, str]:
        """Files that it adds to a bundle."""

    def launch(self, plan: Plan, place: Place) -> Handle:
        """Start the plan's commands."""

    def attach(self, plan: Plan, place: Place) -> Handle | None:
        """An attempt that still goes on without a supervisor; None when there is none."""


def launcher(name: str) -> Launcher:
    """The module of a launcher."""
    module: Any = import_module(LAUNCHERS[name].module)
    return module  # type: ignore[no-any-return]
