"""From a Spec to Resolved: every value concrete, each with its origin; derived values computed once, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfmspec.diagnostics import Diagnostic, Span, fault
from dfmspec.read.load import Origin, Spec
from dfmspec.targets import catalogue, target_module


@dataclass(eq=False)
class Resolved:
    """A configuration with nothing left open."""

    spec: Spec
    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    derived: Mapping[str, Any]
    """What each derivation gives, also where the user set another value."""
    unknown: frozenset[str]
    """Keys whose value is broken, or follows from a broken one; rules that ask for them are skipped."""
    faults: tuple[Diagnostic, ...] = ()
    """Derivations that raised what they should not; their keys are unknown."""

    @property
    def world_size_is_given(self) -> bool:
        """Whether the user, or torchrun, said how many processes there are."""
        return self.origins["cluster.nproc_per_node"].is_set_by_user

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def resolve_spec(spec: Spec) -> Resolved:
    """Compute what follows from the spec's values. Pure: the same spec gives the same result anywhere."""
    values = dict(spec.values)
    origins = dict(spec.origins)
    values["name"] = spec.name
    origins["name"] = _name_origin(spec)

    # In the order of DERIVED. What follows from an unknown value, or counts with a null, is unknown. A null that means
    # something stays.
    legal = catalogue(spec.target)
    derived: dict[str, Any] = {}
    unknown = set(spec.broken)
    faults: list[Diagnostic] = []
    for derivation in target_module(spec.target).DERIVED:
        key = derivation.key
        if not unknown.isdisjoint(derivation.sources):
            unknown.add(key)
            continue
        try:
            derived[key] = derivation.value(values)
        except (ZeroDivisionError, TypeError, OverflowError):
            unknown.add(key)
            continue
        except Exception as error:
            unknown.add(key)
            faults.append(fault(f"the derivation of {key}", error, Span(spec.file)))
            continue
        keeps_null = origins[key].is_set_by_user and legal.null_of(key) == "kept"
        if values[key] is None and not keeps_null:
            values[key] = derived[key]
            origins[key] = Origin("derived", Span("<derived>"), derivation.formula)
    return Resolved(spec, values, origins, derived, frozenset(unknown), tuple(faults))


def _name_origin(spec: Spec) -> Origin:
    """Where the experiment's name comes from: the spec, or the name of its file."""
    if spec.values["name"]:
        return spec.origins["name"]
    return Origin("derived", Span("<derived>"), "the file's name")
