"""The rules: families in one table, and the pass that runs them all.

The codes of the structural stage (SPC1xx, SPC2xx, CKP101) are given out in `document`, `load` and `structure`.
"""

from __future__ import annotations

from collections.abc import Iterable

from dfmspec.check.rules import (
    batch,
    checkpoint,
    dataset,
    distributed,
    evaluation,
    launch,
    launchers,
    model,
    networks,
    optimizer,
    parallel,
    pipeline,
    precision,
    samples,
    sequence,
    spec,
    structural,
)
from dfmspec.check.rules.base import Rule, UnknownValue, View
from dfmspec.diagnostics import Diagnostic, Span, shown
from dfmspec.read.resolve import Resolved
from dfmspec.spec.paths import PLACES, local_path

FAMILIES = (structural, spec, parallel, pipeline, sequence, batch, model, networks, precision, optimizer, distributed, checkpoint, evaluation, dataset, samples, launch, launchers)
RULES: tuple[Rule, ...] = tuple(rule for family in FAMILIES for rule in family.RULES)
LEVELS = ("spec", "paths", "data")
"""What a check may look at: the spec alone, files too, samples too."""


def check_spec(resolved: Resolved, *, levels: Iterable[str] = ("spec", "paths")) -> tuple[Diagnostic, ...]:
    """Every finding of a spec that no comment suppresses, sorted by place: the structural ones and those of all rules of the levels."""
    return shown(all_findings(resolved, levels=levels))


def all_findings(resolved: Resolved, *, levels: Iterable[str] = ("spec", "paths")) -> tuple[Diagnostic, ...]:
    """Every finding of a spec, sorted by place; those that a comment suppresses say so."""
    wanted, target, found = {*levels}, resolved.spec.target, list(resolved.spec.problems)
    view = View(resolved)
    unreadable = any(document.data is None and document.problems for document in resolved.spec.documents)
    for rule in RULES:
        if rule.level in wanted and target in rule.targets and not unreadable:
            found.extend(_findings(rule, view))
    marked = [document for document in resolved.spec.documents if "dfmspec:" in document.text]
    if marked:
        from dfmspec.check.suppressions import suppressed

        judged = {rule.code for rule in RULES if rule.level in wanted and target in rule.targets}
        found = suppressed(found, marked, judged, {rule.code: rule.level for rule in RULES})
    return tuple(sorted(set(found), key=lambda diagnostic: diagnostic.sort_key))


def _findings(rule: Rule, view: View) -> list[Diagnostic]:
    found = []
    try:
        for finding in rule.check(view):
            severity = rule.severity if finding.severity is None else finding.severity
            span, layer = _place(finding.path, view.resolved)
            found.append(Diagnostic(span, rule.code, rule.name, severity, finding.message, finding.hint, finding.path, layer, None, finding.fix))
    except (UnknownValue, ZeroDivisionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        if rule.level not in ("paths", "data"):
            raise
        found.append(_unseen(error, view.resolved))
    return found


def _unseen(error: Exception, resolved: Resolved) -> Diagnostic:
    """What the operating system would not show to a rule, at the key that names it."""
    rule, place = launch.UNSEEN, str(getattr(error, "filename", None) or "")
    named = ((key, resolved.values.get(key)) for key in sorted(PLACES, key=lambda key: key not in resolved.spec.users))
    key = next((key for key, value in named if isinstance(value, str) and value and place.startswith(str(local_path(value)))), "")
    where = place if len(place) < 100 else f"a path of {len(place)} characters" if place else "what the spec names"
    span, layer = _place(tuple(key.split(".")) if key else (), resolved)
    message = f"{key}{': ' if key else ''}{where} cannot be looked at: {getattr(error, 'strerror', None) or error}"
    return Diagnostic(span, rule.code, rule.name, rule.severity, message, "check the path and its permissions", tuple(key.split(".")) if key else (), layer)


def _place(path: tuple[str | int, ...], resolved: Resolved) -> tuple[Span, str]:
    """Where the value was set, and by which layer; in the spec's file when it was not set by anybody."""
    key = ".".join(map(str, path))
    origin = resolved.origins.get(key)
    if origin is None or not origin.is_users:
        origin = resolved.spec.origins.get(key)  # a null of the user's, which a derived value stands in for
    if origin is not None and origin.is_users:
        return origin.span, "" if origin.layer in ("spec", "override") else origin.layer
    documents = resolved.spec.documents
    section = documents[0].keys.get(path[:1]) if documents else None
    return section or Span(resolved.spec.file), origin.layer if origin is not None else ""
