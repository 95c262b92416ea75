"""The rules: families in one table, and the pass that runs them all.

The codes of the structural stage (SPC1xx, SPC2xx, CKP101) are given out in `document`, `load` and `structure`; what a
rule raises is a finding as well (SPC501).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import chain

from dfmspec.check.rules import (
    batch,
    checkpoint,
    containers,
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
    policies,
    precision,
    samples,
    sequence,
    spec,
    structural,
)
from dfmspec.check.rules.base import Rule, UnknownValue, View, listed
from dfmspec.check.rules.spec import has_secrets
from dfmspec.diagnostics import UNASKED, Diagnostic, Finding, Path, Severity, Span, dotted, fault, not_suppressed
from dfmspec.figures import counted
from dfmspec.read.document import Document
from dfmspec.read.resolve import Resolved
from dfmspec.redaction import redacted, secrets_of
from dfmspec.spec.paths import PLACES, local_path

FAMILIES = (
    structural,
    spec,
    parallel,
    pipeline,
    sequence,
    batch,
    model,
    networks,
    precision,
    optimizer,
    distributed,
    checkpoint,
    evaluation,
    dataset,
    samples,
    launch,
    launchers,
    containers,
    policies,
)
RULES: tuple[Rule, ...] = tuple(chain.from_iterable(family.RULES for family in FAMILIES))
LETTERS = {
    "SPC": "The spec itself: reading it, its keys and types, values that follow from others",
    "SEC": "Secrets",
    "PAR": "How ranks are arranged, and what the arrangement must divide",
    "PIP": "Pipeline stages",
    "SEQ": "The length of packs, and how ranks share it",
    "BAT": "Batch sizes and the length of a run",
    "MOD": "The network, and what it recomputes",
    "SMP": "The sampler",
    "WAN": "NVIDIA DFM's WAN",
    "FLX": "NVIDIA DFM's FLUX",
    "PRE": "Number formats",
    "OPT": "Optimizer, schedules, seeds",
    "DDP": "Gradients and parameters over data-parallel ranks",
    "CKP": "What is saved, where, and what a run resumes from",
    "EVL": "Evaluation while training",
    "DAT": "The dataset, its metadata and its samples",
    "RUN": "Processes, machines, launchers, paths",
    "ENV": "Environment variables",
    "POL": "The policy of the site",
}
"""The letters of a code, and what such rules look at."""
LEVELS = ("spec", "paths", "data")
"""What a check may look at: the spec alone, files too, samples too."""


def check_spec(resolved: Resolved, *, levels: Iterable[str] = ("spec", "paths")) -> tuple[Diagnostic, ...]:
    """Every finding of a spec that no comment suppresses, sorted by place: the structural ones, and the rules' own."""
    return not_suppressed(all_findings(resolved, levels=levels))


def all_findings(
    resolved: Resolved, *, levels: Iterable[str] = ("spec", "paths"), site: Iterable[Diagnostic] = ()
) -> tuple[Diagnostic, ...]:
    """Every finding of a spec, sorted by place; those that a comment suppresses say so.

    Args:
        resolved: the spec.
        levels: what is looked at.
        site: what the site's policy finds, which no comment suppresses.
    """
    wanted = {*levels}
    target = resolved.spec.target
    documents = resolved.spec.documents
    rules = [rule for rule in RULES if rule.level in wanted and target in rule.targets]

    # Where a file cannot be parsed, its values are missing, and rules would judge what nobody wrote.
    found = [*resolved.spec.problems, *resolved.faults]
    unreadable = any(document.data is None and document.problems for document in documents)
    if not unreadable:
        view = View(resolved, starts="run" in wanted)
        unasked = []
        for rule in rules:
            view.missed.clear()
            found.extend(_findings(rule, view))
            if view.missed:
                unasked.append((rule.code, *view.missed))
        if unasked:
            found.append(_not_asked(unasked, resolved))

    # Most specs have no such comment, and need not wait for what reads it.
    marked = [document for document in documents if "dfmspec:" in document.text]
    if marked:
        from dfmspec.check.suppressions import suppressed

        judged = {rule.code for rule in rules}
        level_of = {rule.code: rule.level for rule in RULES}
        found = suppressed(found, marked, judged, level_of)

    found = [*found, *site]

    # A dict drops what was found twice, and keeps the order where places are equal. What is told has no secret.
    if has_secrets(documents):
        texts = [document.text for document in documents]
        literals = {text[each.start : each.end] for text in texts for each in secrets_of(text)}
        found = [_told(finding, literals) for finding in found]
    once = dict.fromkeys(found)
    return tuple(sorted(once, key=lambda diagnostic: diagnostic.sort_key))


def _told(finding: Diagnostic, literals: Collection[str]) -> Diagnostic:
    """A finding whose words have no secret of the spec's."""
    message = redacted(finding.message, literals)
    hint = redacted(finding.hint, literals)
    if (message, hint) == (finding.message, finding.hint):
        return finding
    return finding._replace(message=message, hint=hint, fix=())


def _findings(rule: Rule, view: View) -> list[Diagnostic]:
    """What one rule says; nothing more from where it asks for a value that is unknown or divides by zero."""
    found = []
    try:
        for finding in rule.check(view):
            found.append(diagnostic_of(rule, finding, view.resolved))
    except (UnknownValue, ZeroDivisionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        # Rules that look at files meet whatever the operating system says; from others it is a fault.
        if rule.level in ("paths", "data"):
            found.append(_unseen(error, view.resolved))
        else:
            found.append(_fault(rule, error, view.resolved))
    except Exception as error:
        found.append(_fault(rule, error, view.resolved))
    return found


def _not_asked(unasked: Sequence[tuple[str, ...]], resolved: Resolved) -> Diagnostic:
    """One note of all rules that could not judge, since a value that they need is not known."""
    keys = sorted({key for _, *keys in unasked for key in keys} & resolved.unknown) or ["a value"]
    codes = listed(code for code, *_ in unasked[:_LISTED_CODES])
    more = ", ..." if len(unasked) > _LISTED_CODES else ""
    rules = counted(len(unasked), "rule")
    return Diagnostic(
        Span(resolved.spec.file),
        UNASKED,
        "rules-not-asked",
        Severity.HINT,
        f"{rules} could not judge without {listed(keys)}: {codes}{more}",
        "mend the errors, and look again",
    )


_LISTED_CODES = 6
"""How many codes a note names."""


def _fault(rule: Rule, error: Exception, resolved: Resolved) -> Diagnostic:
    """What a rule raised that it should not."""
    return fault(f"rule {rule.code} {rule.name}", error, Span(resolved.spec.file))


def diagnostic_of(rule: Rule, finding: Finding, resolved: Resolved) -> Diagnostic:
    """What a rule says, at the place where the value was set."""
    span, layer = _place(finding.path, resolved)
    return Diagnostic(
        span=span,
        code=rule.code,
        name=rule.name,
        severity=rule.severity if finding.severity is None else finding.severity,
        message=finding.message,
        hint=finding.hint,
        path=finding.path,
        layer=layer,
        fix=finding.fix,
    )


def _unseen(error: Exception, resolved: Resolved) -> Diagnostic:
    """What the operating system would not show to a rule, at the key that names it."""
    place = str(getattr(error, "filename", None) or "")
    key = _key_that_names(place, resolved)

    # What and why, in words; a path may be longer than a reader has patience for.
    where = place
    length = len(place)
    if length >= 100:
        where = f"a path of {length} characters"
    reason = getattr(error, "strerror", None) or error
    message = f"{where} cannot be looked at: {reason}"
    if key:
        message = f"{key}: {message}"

    path = tuple(key.split(".")) if key else ()
    finding = Finding(path, message, "check the path and its permissions")
    return diagnostic_of(launch.UNSEEN, finding, resolved)


def _key_that_names(place: str, resolved: Resolved) -> str:
    """The key whose path a place lies under, one that the user set before others; empty where there is none."""
    for key in sorted(PLACES, key=lambda key: key not in resolved.spec.set_by_user):
        value = resolved.values.get(key)
        if isinstance(value, str) and value and place.startswith(str(local_path(value))):
            return key
    return ""


def _place(path: Path, resolved: Resolved) -> tuple[Span, str]:
    """Where the value was set, and by which layer; in the spec's file when it was not set by anybody."""
    # An entry of a list or of a mapping is its key's.
    key = dotted(path)
    if key not in resolved.origins:
        key = dotted(path[:2])
    origin = resolved.origins.get(key)
    # A derived value may stand in for a null of the user's.
    if origin is None or not origin.is_set_by_user:
        origin = resolved.spec.origins.get(key)
    documents = resolved.spec.documents
    if origin is not None and origin.is_set_by_user:
        layer = origin.layer
        if layer in ("spec", "override"):
            layer = ""
        return _place_of_entry(path, origin.span, documents), layer

    # Nobody set it: the section where it would stand.
    section = documents[0].keys.get(path[:1]) if documents else None
    layer = "" if origin is None else origin.layer
    return section or Span(resolved.spec.file), layer


def _place_of_entry(path: Path, place: Span, documents: Sequence[Document]) -> Span:
    """Where an entry of a list or of a mapping stands, in the file that has its key at a place."""
    if len(path) <= 2:
        return place
    for document in documents:
        if document.file == place.file and document.keys.get(path[:2]) == place:
            return document.values.get(path) or place
    return place
