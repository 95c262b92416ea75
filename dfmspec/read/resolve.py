"""From a Spec to Resolved: every value concrete, each with its origin; references and derived values, once, here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dfmspec.diagnostics import Diagnostic, Span, fault
from dfmspec.read.interpolation import refers
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
    """References that lead nowhere; derivations that raised what they should not. Their keys are unknown."""

    @property
    def world_size_is_given(self) -> bool:
        """Whether the user, or torchrun, said how many processes there are."""
        return self.origins["cluster.nproc_per_node"].is_set_by_user

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def resolve_spec(spec: Spec) -> Resolved:
    """Compute what follows from the spec's values. Pure: the same spec gives the same result anywhere."""
    draft = Draft(spec)
    waiting = []
    if spec.cell is not None or any("${spec." in document.text for document in spec.documents):
        waiting = [key for key in spec.set_by_user if refers(spec.values[key])]
    if waiting:
        from dfmspec.read.references import fill

        fill(draft, waiting)
    derived = draft.derive()
    return Resolved(
        spec, draft.values, draft.origins, derived, frozenset(draft.unknown), tuple(dict.fromkeys(draft.faults))
    )


class Draft:
    """A configuration on the way to be resolved."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.values = dict(spec.values)
        self.origins = dict(spec.origins)
        self.unknown = set(spec.broken)
        self.faults: list[Diagnostic] = []
        self.values["name"] = spec.name
        self.origins["name"] = _name_origin(spec)

    def derive(self) -> dict[str, Any]:
        """Fill in what follows from other values, and return what each derivation gives.

        In the order of DERIVED. What follows from an unknown value, or counts with a null, is unknown. A null that
        means something stays.
        """
        legal = catalogue(self.spec.target)
        derived: dict[str, Any] = {}
        for derivation in target_module(self.spec.target).DERIVED:
            key = derivation.key
            if not self.unknown.isdisjoint(derivation.sources):
                self.unknown.add(key)
                continue
            try:
                derived[key] = derivation.value(self.values)
            except (ZeroDivisionError, TypeError, OverflowError):
                self.unknown.add(key)
                continue
            except Exception as error:
                self.unknown.add(key)
                self.faults.append(fault(f"the derivation of {key}", error, Span(self.spec.file)))
                continue
            keeps_null = self.origins[key].is_set_by_user and legal.null_of(key) == "kept"
            if self.values[key] is None and not keeps_null:
                self.values[key] = derived[key]
                self.origins[key] = Origin("derived", Span("<derived>"), derivation.formula)
        return derived


def _name_origin(spec: Spec) -> Origin:
    """Where the experiment's name comes from: the spec, or the name of its file."""
    if spec.values["name"]:
        return spec.origins["name"]
    return Origin("derived", Span("<derived>"), "the file's name")
