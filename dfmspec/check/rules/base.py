"""A rule, and the few shapes that most constraints have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dfmspec.diagnostics import Finding, Path, Severity
from dfmspec.read.resolve import Resolved
from dfmspec.targets import TARGETS, Target, target_module, targets_of
from dfmspec.targets.layout import Layout, nearest_multiples

ALL = tuple(TARGETS)
OURS = targets_of(code="dfmspec")
DFM = targets_of(code="NVIDIA DFM")
DIT = targets_of(network="dit")
DFM_DIT = targets_of(code="NVIDIA DFM", network="dit")
WAN = targets_of(network="wan")
FLUX = targets_of(network="flux")
"""For which targets a rule holds."""
ERROR, WARNING, HINT = Severity.ERROR, Severity.WARNING, Severity.HINT

TP, PP, CP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size", "model.context_parallel_size"
VPP, SP = "model.virtual_pipeline_model_parallel_size", "model.sequence_parallel"
LAYERS, HIDDEN, HEADS, FFN = "model.num_layers", "model.hidden_size", "model.num_attention_heads", "model.ffn_hidden_size"
GBS, MBS, ITERS, SAMPLES = "train.global_batch_size", "train.micro_batch_size", "train.train_iters", "train.train_samples"
LENGTH = "dataset.task_encoder_seq_length"


class UnknownValue(Exception):
    """A rule asked for a value that is broken, or that the target does not have; the rule is skipped."""


class View:
    """A Resolved as rules see it: an unknown value stops the rule that asks for it."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved

    def __getitem__(self, key: str) -> Any:
        if key in self.resolved.unknown or key not in self.resolved.values:
            raise UnknownValue(key)
        return self.resolved.values[key]

    def is_users(self, key: str) -> bool:
        """Whether a person set the key."""
        origin = self.resolved.origins.get(key)
        return origin is not None and origin.is_users

    def users(self, *keys: str) -> list[str]:
        """Those of the keys that a person set to something other than null."""
        return [key for key in keys if self.is_users(key) and self.resolved.values[key] is not None]

    def section(self, name: str) -> list[str]:
        """The keys of a section that a person set."""
        return [key for key in self.resolved.spec.users if key.startswith(f"{name}.")]

    @property
    def target(self) -> str:
        """What trains, by name: to look something up, never to compare."""
        return self.resolved.spec.target

    @property
    def trainer(self) -> Target:
        """What trains: its module, whose attributes say in what it differs."""
        return target_module(self.target)

    @property
    def network(self) -> str:
        """What is trained."""
        return TARGETS[self.target].network

    @property
    def layout(self) -> Layout:
        """The arrangement of ranks."""
        return Layout(self["cluster.nnodes"] * self["cluster.nproc_per_node"], self[TP], self[PP], self[CP])

    @property
    def data_parallel_size(self) -> int:
        """DP; unknown when the world size does not divide (a finding of its own)."""
        if not self.layout.data_parallel_size:
            raise UnknownValue("data_parallel_size")
        return self.layout.data_parallel_size

    @property
    def is_mock(self) -> bool:
        """Whether the data are random tensors, never read from disk."""
        return bool(self["data.source"] == "mock")


Check = Callable[[View], Iterable[Finding]]
Text = str | Callable[[View], str]


class Rule(NamedTuple):
    """One constraint, with its manual; its example and near miss are tests/corpus/rules/<code>."""

    code: str
    name: str
    """The fault, in words that read well after "allow"."""
    severity: Severity
    check: Check
    why: str
    """What would happen."""
    source: str = ""
    """Where the constraint comes from."""
    targets: tuple[str, ...] = ALL
    level: str = "spec"
    """"spec" needs the spec alone, "paths" looks at files, "data" reads samples."""


def path(key: str) -> Path:
    """`model.num_layers` as a Path."""
    return tuple(key.split("."))


def say(view: View, text: Text) -> str:
    """A message, or what its function says."""
    return text if isinstance(text, str) else text(view)


def excludes(when: Callable[[View], Any], *, at: str | Callable[[View], str], message: Text, hint: Text) -> Check:
    """A combination that must not be."""

    def check(view: View) -> Iterator[Finding]:
        if when(view):
            yield Finding(path(say(view, at)), say(view, message), say(view, hint))

    return check


def requires(key: str, *needs: tuple[str, Any], because: str, unless: Callable[[View], bool] = lambda view: False) -> Check:
    """`key`, when true, needs each other key at the given value."""

    def check(view: View) -> Iterator[Finding]:
        if not view[key] or unless(view):
            return
        for other, wanted in needs:
            if view[other] != wanted:
                message = f"{key} needs {other} {shown(wanted)}, but it is {shown(view[other])}: {because}"
                yield Finding(path(key), message, f"set {other} to {shown(wanted)}, or {key} to false")

    return check


def must_divide(divisor: str, number: str, *, words: str, at: str | None = None, fits: Callable[[View, int], bool] = lambda view, value: True) -> Check:
    """`number` must be a multiple of `divisor`; the hint names the divisors that work, and other numbers that `fits` allows."""

    def check(view: View) -> Iterator[Finding]:
        small, large = view[divisor], view[number]
        if large % small:
            works = ", ".join(str(value) for value in range(1, 65) if large % value == 0)
            near = " or ".join(str(value) for value in nearest_multiples(large, small) if fits(view, value))
            yield Finding(
                path(at or (divisor if view.is_users(divisor) else number)),
                f"{number} {large} is not a multiple of {divisor} {small}; {words}",
                f"{divisor} may be {works}" + (f"; or {number} {near}" if near else ""),
            )

    return check


def must_be(key: str, value: Any, because: str) -> Check:
    """A key that leaves no choice."""
    return excludes(lambda v: v[key] != value, at=key, message=lambda v: f"{key} {shown(v[key])}: {because}", hint=f"{key} must be {shown(value)}; leave it out")


def same(one: str, other: str, *, when: Callable[[View], Any], what: str) -> Check:
    """Two keys that must agree."""
    return excludes(
        lambda v: when(v) and v[one] != v[other], at=lambda v: one if v.is_users(one) else other,
        message=lambda v: f"{one} {v[one]} and {other} {v[other]} are {what}, and must be the same", hint=lambda v: f"{one} {v[other]}, or {other} {v[one]}",
    )  # fmt: skip


def together(*checks: Check) -> Check:
    """Several checks under one code."""

    def check(view: View) -> Iterator[Finding]:
        for one in checks:
            try:
                yield from one(view)
            except UnknownValue:
                continue

    return check


def shown(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
