"""A rule, and the few shapes that most constraints have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from dfmspec.diagnostics import Finding, Path, Severity
from dfmspec.layout import Layout, nearest_multiples
from dfmspec.resolve import Resolved

BOTH = ("megatron_core", "dfm")
OURS = ("megatron_core",)
DFM = ("dfm",)


class UnknownValue(Exception):
    """A rule asked for a value that is broken or not given; the rule is skipped."""


@dataclass(frozen=True)
class View:
    """A Resolved as rules see it: an unknown value stops the rule that asks for it."""

    resolved: Resolved

    def __getitem__(self, key: str) -> Any:
        if key in self.resolved.unknown or key not in self.resolved.values:
            raise UnknownValue(key)
        return self.resolved.values[key]

    def is_users(self, key: str) -> bool:
        """Whether a person set the key."""
        return self.resolved.origins[key].is_users

    @property
    def layout(self) -> Layout:
        """The arrangement of ranks."""
        return Layout(
            self["cluster.nnodes"] * self["cluster.nproc_per_node"],
            self["model.tensor_model_parallel_size"],
            self["model.pipeline_model_parallel_size"],
            self["model.context_parallel_size"],
        )

    @property
    def data_parallel_size(self) -> int:
        """DP; unknown when the world size does not divide (a finding of its own)."""
        if not self.layout.data_parallel_size:
            raise UnknownValue("data_parallel_size")
        return self.layout.data_parallel_size


Check = Callable[[View], Iterable[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One constraint, with its manual."""

    code: str
    name: str
    """The fault, in words that read well after "allow"."""
    severity: Severity
    check: Check
    why: str
    """What would happen."""
    example: tuple[str, ...]
    """Overrides on the smallest spec that make it fire."""
    instead: tuple[str, ...]
    """Overrides that do not."""
    targets: tuple[str, ...] = BOTH
    level: str = "spec"
    """"spec" needs the spec alone, "paths" looks at files."""


def path(key: str) -> Path:
    """`model.num_layers` as a Path."""
    return tuple(key.split("."))


def must_divide(divisor: str, number: str, *, words: str, at: str | None = None) -> Check:
    """`number` must be a multiple of `divisor`; the hint names the divisors that work."""

    def check(view: View) -> Iterator[Finding]:
        small, large = view[divisor], view[number]
        if large % small:
            works = ", ".join(str(value) for value in range(1, 65) if large % value == 0)
            near = " or ".join(map(str, nearest_multiples(large, small)))
            yield Finding(
                path(at or (divisor if view.is_users(divisor) else number)),
                f"{number} {large} is not a multiple of {divisor} {small}; {words}",
                f"{divisor} may be {works}; or {number} {near}",
            )

    return check


def excludes(when: Callable[[View], bool], *, at: str, message: str, hint: str) -> Check:
    """A combination that must not be."""

    def check(view: View) -> Iterator[Finding]:
        if when(view):
            yield Finding(path(at), message, hint)

    return check
