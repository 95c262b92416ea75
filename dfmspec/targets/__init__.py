"""What trains: how a target derives values and what command starts it. A new target is a file here and a line in TARGETS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from dfmspec.diagnostics import Severity

Values = Mapping[str, Any]


class Reading(Protocol):
    """A configuration as a script sees it."""

    tree: dict[str, Any]
    """Section -> field -> value."""
    skipped: list[str]
    """Keys that it dropped."""

    def __getitem__(self, key: str) -> Any:
        """A value by its dotted key."""


class Derived(NamedTuple):
    """A value that follows from others, unless the user sets it."""

    key: str
    sources: tuple[str, ...]
    value: Callable[[Values], Any]
    formula: str
    """How, in words: shown as the value's origin."""
    differing: Severity | None = None
    """What another value of the user's is, when a source is the user's too; None: their choice."""


class Target(Protocol):
    """A module of this package."""

    DERIVED: tuple[Derived, ...]
    ENTRY: str

    def config(self, values: Values) -> dict[str, Any]:
        """What the plan's config.yaml holds."""

    def arguments(self, values: Values, origins: Mapping[str, Any]) -> list[str]:
        """The script's arguments, with CONFIG for the configuration's file."""

    def read_back(self, values: Values, text: str) -> Reading | None:
        """What the script makes of the text of config.yaml, where it has a reader of its own."""


CONFIG = "config.yaml"
"""The configuration's file in a bundle."""
TARGETS = {
    "megatron_core": "dfmspec.targets.megatron_core", "dfm": "dfmspec.targets.dfm",
    "dfm_wan": "dfmspec.targets.dfm.wan", "dfm_flux": "dfmspec.targets.dfm.flux",
}  # fmt: skip


def target_module(name: str) -> Target:
    """The module of a target."""
    module: Any = import_module(TARGETS[name])
    return module  # type: ignore[no-any-return]


def round_float(value: float) -> float:
    """0.1 * 9e-5 as 9e-06, not 9.000000000000001e-06."""
    return float(f"{value:.12g}")


def minutes_of(text: str) -> float:
    """Slurm's ways of writing a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + minutes + seconds / 60
    hours, minutes, seconds = {1: (0, parts[0], 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return hours * 60 + minutes + seconds / 60
