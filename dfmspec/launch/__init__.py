"""How a plan's processes are started. A new launcher is a file here and a line in LAUNCHERS."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from dfmspec.plan import Plan


class Handle(Protocol):
    """Processes that were started, one torchrun a node."""

    def poll(self) -> list[int | None]:
        """Exit code of each node's torchrun; None while it runs."""

    def stop(self, number: int) -> None:
        """Ask the ranks to save and stop."""

    def kill(self) -> None:
        """End everything, now."""

    def described(self) -> list[tuple[str, list[str], list[str]]]:
        """(host, argv, names of the variables set) of each node."""


class Launcher(Protocol):
    """A module of this package."""

    def launch(self, plan: Plan, run_dir: str, attempt_dir: str) -> Handle:
        """Start the plan's commands."""


LAUNCHERS = {"local": "dfmspec.launch.local"}


def launcher(name: str) -> Launcher:
    """The module of a launcher."""
    module: Any = import_module(LAUNCHERS[name])
    return module  # type: ignore[no-any-return]
