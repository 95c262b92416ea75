"""A rule, and the few shapes that most constraints have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from dfmspec.diagnostics import Finding, Path, Severity
from dfmspec.read.resolve import Resolved
from dfmspec.targets import TARGETS, Target, target_module, targets_of
from dfmspec.targets.layout import Layout, nearest_multiples

# For which targets a rule holds.
ALL = tuple(TARGETS)
OURS = targets_of(code="dfmspec")
DFM = targets_of(code="NVIDIA DFM")
DIT = targets_of(network="dit")
DFM_DIT = targets_of(code="NVIDIA DFM", network="dit")
WAN = targets_of(network="wan")
FLUX = targets_of(network="flux")

# How bad a finding is.
ERROR = Severity.ERROR
WARNING = Severity.WARNING
HINT = Severity.HINT

# Keys of the layout of ranks.
TP = "model.tensor_model_parallel_size"
PP = "model.pipeline_model_parallel_size"
CP = "model.context_parallel_size"
VPP = "model.virtual_pipeline_model_parallel_size"
SP = "model.sequence_parallel"

# Keys of the network's geometry.
LAYERS = "model.num_layers"
HIDDEN = "model.hidden_size"
HEADS = "model.num_attention_heads"
FFN = "model.ffn_hidden_size"

# Keys of the batch and of the run's length.
GBS = "train.global_batch_size"
MBS = "train.micro_batch_size"
ITERS = "train.train_iters"
SAMPLES = "train.train_samples"
LENGTH = "dataset.task_encoder_seq_length"


class UnknownValue(Exception):
    """A rule asked for a value that is broken or null, or that the target does not have; the rule is skipped."""


class View:
    """A Resolved as rules see it: an unknown value, or a null, stops the rule that asks for it.

    What a rule has yielded before it asks stays; so a rule asks for a key no earlier than it needs it. A rule to which
    null is a value like others asks with `or_null`, and compares what it gets with None before it counts with it.
    """

    def __init__(self, resolved: Resolved, *, starts: bool = False) -> None:
        self.resolved = resolved
        self.starts = starts
        """Whether a run is about to start here, rather than a spec to be looked at."""
        self.missed: set[str] = set()
        """The broken keys that a rule has asked for."""

    def __getitem__(self, key: str) -> Any:
        """The value of a key, never null.

        Raises:
            UnknownValue: the value is broken or null, or the target has no such key.
        """
        value = self.or_null(key)
        if value is None:
            raise UnknownValue(key)
        return value

    def or_null(self, key: str) -> Any:
        """The value of a key, for a rule that knows what its null means.

        Raises:
            UnknownValue: the value is broken, or the target has no such key.
        """
        if key in self.resolved.unknown:
            self.missed.add(key)
            raise UnknownValue(key)
        if key not in self.resolved.values:
            raise UnknownValue(key)
        return self.resolved.values[key]

    def is_set_by_user(self, key: str) -> bool:
        """Whether a person set the key."""
        origin = self.resolved.origins.get(key)
        return origin is not None and origin.is_set_by_user

    def set_by_user(self, *keys: str) -> list[str]:
        """The keys, among those given, that a person set to something other than null."""
        return [key for key in keys if self.is_set_by_user(key) and self.resolved.values[key] is not None]

    def key_set_by_user(self, key: str, *, otherwise: str) -> str:
        """The key where a person set it; else the other, at which a finding about both stands."""
        return key if self.is_set_by_user(key) else otherwise

    def section(self, name: str) -> list[str]:
        """The keys of a section that a person set."""
        return [key for key in self.resolved.spec.set_by_user if key.startswith(f"{name}.")]

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
        world_size = self["cluster.nnodes"] * self["cluster.nproc_per_node"]
        return Layout(
            world_size,
            tensor_model_parallel_size=self[TP],
            pipeline_model_parallel_size=self[PP],
            context_parallel_size=self[CP],
        )

    @property
    def data_parallel_size(self) -> int:
        """How many copies of the model train.

        Raises:
            UnknownValue: the world size is no multiple of a copy's ranks, which is a finding of its own.
        """
        size = self.layout.data_parallel_size
        if not size:
            raise UnknownValue("data_parallel_size")
        return size

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
    """"spec" needs the spec alone, "paths" looks at files, "data" reads samples.

    "load", "deep", "policy" and "fault" are given out elsewhere.
    """


def path(key: str) -> Path:
    """`model.num_layers` as a Path."""
    return tuple(key.split("."))


def say(view: View, text: Text) -> str:
    """A message, or what its function says."""
    return text if isinstance(text, str) else text(view)


def excludes(
    when: Callable[[View], Any],
    *,
    at: str | Callable[[View], str],
    message: Text,
    hint: Text,
) -> Check:
    """A combination that must not be: where `when` is true, one finding at the key `at`."""

    def check(view: View) -> Iterator[Finding]:
        if when(view):
            yield Finding(path(say(view, at)), say(view, message), say(view, hint))

    return check


def _never(view: View) -> bool:
    return False


def requires(
    key: str,
    *needs: tuple[str, Any],
    because: str,
    unless: Callable[[View], bool] = _never,
) -> Check:
    """`key`, when true, needs each other key at the given value; not where `unless` is true."""

    def check(view: View) -> Iterator[Finding]:
        if not view[key] or unless(view):
            return
        for other, needed in needs:
            value = view.or_null(other)
            if value != needed:
                wanted = as_yaml(needed)
                yield Finding(
                    path(key),
                    f"{key} needs {other} {wanted}, but it is {as_yaml(value)}: {because}",
                    f"set {other} to {wanted}, or {key} to false",
                )

    return check


def _any_number(view: View, number: int) -> bool:
    return True


def must_divide(
    divisor: str,
    number: str,
    *,
    words: str,
    at: str | None = None,
    fits: Callable[[View, int], bool] = _any_number,
) -> Check:
    """`number` must be a multiple of `divisor`.

    The hint names the divisors up to 64 that work, and the nearest other numbers that `fits` allows. The finding is at
    the key `at`; without one, at the key that a person set.
    """

    def check(view: View) -> Iterator[Finding]:
        small = view[divisor]
        large = view[number]
        if large % small == 0:
            return
        works = [value for value in range(1, 65) if large % value == 0]
        near = [value for value in nearest_multiples(large, small) if fits(view, value)]
        hint = f"{divisor} may be {listed(works)}"
        if near:
            hint += f"; or {number} {listed(near, ' or ')}"
        yield Finding(
            path(at or view.key_set_by_user(divisor, otherwise=number)),
            f"{number} {large} is not a multiple of {divisor} {small}; {words}",
            hint,
        )

    return check


def must_be(key: str, value: Any, because: str) -> Check:
    """A key that leaves no choice."""
    return excludes(
        lambda v: v.or_null(key) != value,
        at=key,
        message=lambda v: f"{key} {as_yaml(v.or_null(key))}: {because}",
        hint=f"{key} must be {as_yaml(value)}; leave it out",
    )


def same(one: str, other: str, *, when: Callable[[View], Any], what: str) -> Check:
    """Two keys that must agree where `when` is true."""
    return excludes(
        lambda v: when(v) and v[one] != v[other],
        at=lambda v: v.key_set_by_user(one, otherwise=other),
        message=lambda v: f"{one} {v[one]} and {other} {v[other]} are {what}, and must be the same",
        hint=lambda v: f"{one} {v[other]}, or {other} {v[one]}",
    )


def together(*checks: Check) -> Check:
    """Several checks under one code."""

    def check(view: View) -> Iterator[Finding]:
        # Each check stands for itself: an unknown value stops that one alone.
        for one in checks:
            try:
                yield from one(view)
            except UnknownValue:
                continue

    return check


def as_yaml(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def listed(values: Iterable[Any], separator: str = ", ") -> str:
    """Some values in a message: "2, 4, 8"."""
    return separator.join(map(str, values))
