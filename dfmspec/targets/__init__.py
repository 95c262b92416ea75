"""What trains: how a target derives values and what command starts it. A new target is a file here and a line in TARGETS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from dfmspec.diagnostics import Severity

Values = Mapping[str, Any]


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

    def minimal_arguments(self, values: Values, origins: Mapping[str, Any]) -> list[str] | None:
        """The script's arguments when no config file is needed; None when one is."""


TARGETS = {"megatron_core": "dfmspec.targets.megatron_core", "dfm": "dfmspec.targets.dfm"}


def target_module(name: str) -> Target:
    """The module of a target."""
    module: Any = import_module(TARGETS[name])
    return module  # type: ignore[no-any-return]


def round_float(value: float) -> float:
    """0.1 * 9e-5 as 9e-06, not 9.000000000000001e-06."""
    return float(f"{value:.12g}")
