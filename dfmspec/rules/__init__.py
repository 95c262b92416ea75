"""The rules: families in one table, and the pass that runs them all.

The codes of the structural stage (SPC1xx, SPC2xx, CKP101) are given out in `document` and `load`.
"""

from __future__ import annotations

from collections.abc import Iterable

from dfmspec.diagnostics import Diagnostic, Span
from dfmspec.resolve import Resolved
from dfmspec.rules import files, model, parallel, training
from dfmspec.rules.base import Rule, UnknownValue, View

RULES: tuple[Rule, ...] = (*parallel.RULES, *training.RULES, *model.RULES, *files.RULES)
LEVELS = ("spec", "paths")
"""What a check may look at: the spec alone, or files too."""


def check_spec(resolved: Resolved, *, levels: Iterable[str] = LEVELS) -> tuple[Diagnostic, ...]:
    """Every finding of a spec, sorted by place: the structural ones and those of all rules of the levels."""
    wanted, target, found = set(levels), resolved.spec.target, list(resolved.spec.problems)
    for rule in RULES:
        if rule.level in wanted and target in rule.targets:
            found.extend(_findings(rule, resolved))
    return tuple(sorted(set(found), key=lambda diagnostic: diagnostic.sort_key))


def _findings(rule: Rule, resolved: Resolved) -> list[Diagnostic]:
    try:
        return [
            Diagnostic(
                _place(finding.path, resolved), rule.code, rule.name,
                rule.severity if finding.severity is None else finding.severity, finding.message, finding.hint, finding.path,
            )
            for finding in rule.check(View(resolved))
        ]
    except (UnknownValue, ZeroDivisionError):
        return []


def _place(path: tuple[str | int, ...], resolved: Resolved) -> Span:
    """Where the value was set; in the spec's file when it was not set by anybody."""
    origin = resolved.origins.get(".".join(map(str, path)))
    if origin is not None and origin.is_users:
        return origin.span
    documents = resolved.spec.documents
    return documents[0].span(path[:1]) if documents and documents[0].text else Span(resolved.spec.file)
