"""What a site's policy finds: limits, allowed and required values, forbidden keys and owners of paths.

Its findings are of family POL, which no comment, option or baseline takes out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dfmspec.check.policy_file import COMPUTED, Policy, PolicyRule, Values, number, policies, typed
from dfmspec.check.rules import diagnostic_of
from dfmspec.check.rules.base import as_yaml, listed
from dfmspec.check.rules.policies import RULE_OF
from dfmspec.diagnostics import Diagnostic, Finding, Span
from dfmspec.read.document import read_document
from dfmspec.read.interpolation import Unset, with_variables
from dfmspec.read.resolve import Resolved
from dfmspec.read.scalars import as_field, plain
from dfmspec.read.sites import is_the_sites, site_profiles
from dfmspec.spec.paths import absolute, in_run_dir, scheme
from dfmspec.targets import catalogue


class Judged(NamedTuple):
    """What a policy looks at: of a spec, or of a plan."""

    target: str
    values: Values
    is_set: Callable[[str], bool]
    """Whether a person set a key, other than the site itself in a profile."""


# What they find.


def policy_findings(resolved: Resolved) -> list[Diagnostic]:
    """What the policies find in a spec, at the places where its values were set."""
    found: list[Diagnostic] = []
    for policy in policies():
        found += policy.problems
        for rule, finding in violations(policy, judged_of(resolved)):
            found.append(diagnostic_of(RULE_OF[rule.shape], finding, resolved))
    return found


def judged_of(resolved: Resolved) -> Judged:
    """Of a spec, what a policy looks at."""
    values = {key: value for key, value in resolved.values.items() if key not in resolved.unknown}
    return Judged(resolved.spec.target, values, lambda key: _is_set_here(resolved, key))


def plan_findings(target: str, values: Values, file: str) -> list[Diagnostic]:
    """What the policies find in a plan that was made elsewhere or before, all of it at its file.

    Args:
        target: what trains.
        values: keys of a spec, with what the plan has of them.
        file: the plan's.
    """
    found: list[Diagnostic] = []
    judged = Judged(target, values, lambda key: _is_of_a_user(key, target, values))
    for policy in policies():
        found += policy.problems
        for rule, finding in violations(policy, judged):
            told = RULE_OF[rule.shape]
            found.append(
                Diagnostic(Span(file), told.code, told.name, rule.severity, finding.message, finding.hint, finding.path)
            )
    return found


def _is_of_a_user(key: str, target: str, values: Values) -> bool:
    """Whether a plan's value is neither the default nor one that a profile of the site's has."""
    legal = catalogue(target)
    value = values.get(key)
    if value is None or value == dict(legal.defaults()).get(key):
        return False
    section, _, field = key.partition(".")
    for file in site_profiles():
        data = read_document(file).data
        inner = data.get(section) if isinstance(data, dict) else None
        if isinstance(inner, dict) and field in inner and as_field(key, inner[field], legal) == value:
            return False
    return True


def _is_set_here(resolved: Resolved, key: str) -> bool:
    """Whether a key is set, by somebody other than the site."""
    origin = resolved.origins.get(key)
    if origin is None or not origin.is_set_by_user or resolved.values[key] is None:
        return False
    return not (origin.layer == "profile" and is_the_sites(origin.span.file))


def violations(policy: Policy, judged: Judged) -> Iterator[tuple[PolicyRule, Finding]]:
    """What a policy forbids of some values; of several limits of one key, the strictest one that is broken."""
    broken: dict[tuple[str, str], tuple[PolicyRule, str]] = {}
    for rule in policy.rules:
        if not _applies(rule, judged):
            continue
        message = _SHAPES[rule.shape](rule, judged)
        if not message:
            continue
        known = broken.get((rule.key, rule.shape))
        if known is None or _is_stricter(rule, known[0], judged.target):
            broken[rule.key, rule.shape] = (rule, message)
    for rule, message in broken.values():
        because = f": {rule.why}" if rule.why else ""
        contact = f"; {policy.contact} knows of exceptions" if policy.contact else ""
        place = f"{rule.place.file}:{rule.place.line}"
        yield (
            rule,
            Finding(
                _place_of(rule.key),
                f"{message}{because}",
                f"the policy of this site, {place}, holds whatever a spec says{contact}",
                rule.severity,
            ),
        )


def _applies(rule: PolicyRule, judged: Judged) -> bool:
    """Whether the target has the key, and all conditions hold."""
    if rule.key not in COMPUTED and rule.key not in judged.values:
        return False
    for key, wanted in rule.when.items():
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if _value(key, judged) not in [typed(key, each, judged.target) for each in allowed]:
            return False
    return True


def _is_stricter(one: PolicyRule, other: PolicyRule, target: str) -> bool:
    """Whether a limit leaves less room than another one of the same key and shape."""
    if one.shape not in ("max", "min"):
        return False
    mine, its = (number(typed(rule.key, rule.limit, target)) or 0 for rule in (one, other))
    return mine < its if one.shape == "max" else mine > its


# Values.


def _place_of(key: str) -> tuple[str, ...]:
    """Where a finding about a key stands."""
    at = {"cluster.gpus": "cluster.nproc_per_node", "cluster.gpu_hours": "launcher.time_limit"}.get(key, key)
    return tuple(at.split("."))


def _value(key: str, judged: Judged) -> Any:
    """What a key has; None where nobody knows."""
    if key not in COMPUTED:
        return judged.values.get(key)
    try:
        return COMPUTED[key](judged.values)
    except (KeyError, TypeError):
        return None


# The shapes: each says what is wrong, or nothing.


def _over(rule: PolicyRule, judged: Judged) -> str:
    return _beyond(rule, judged, lambda value, limit: value > limit, "at most")


def _less(rule: PolicyRule, judged: Judged) -> str:
    return _beyond(rule, judged, lambda value, limit: value < limit, "at least")


def _beyond(rule: PolicyRule, judged: Judged, is_beyond: Callable[[float, float], bool], words: str) -> str:
    value = _value(rule.key, judged)
    found = number(value)
    limit = number(typed(rule.key, rule.limit, judged.target))
    if found is None or limit is None or not is_beyond(found, limit):
        return ""
    return f"{rule.key} is {_shown(value)}, and may be {words} {_shown(rule.limit)}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else as_yaml(value)


def _no_multiple(rule: PolicyRule, judged: Judged) -> str:
    value = _value(rule.key, judged)
    if not isinstance(value, int) or value % rule.limit == 0:
        return ""
    return f"{rule.key} is {value}, and must be a multiple of {rule.limit}"


def _not_allowed(rule: PolicyRule, judged: Judged) -> str:
    value = _value(rule.key, judged)
    allowed = [typed(rule.key, each, judged.target) for each in rule.limit]
    entries = value if isinstance(value, list) else [value]
    wrong = [entry for entry in entries if entry is not None and entry not in allowed]
    if not wrong:
        return ""
    return f"{rule.key} is {_shown(wrong[0])}, and may be {listed(map(_shown, rule.limit))}"


def _no_match(rule: PolicyRule, judged: Judged) -> str:
    value = _value(rule.key, judged)
    entries = value if isinstance(value, list) else [value]
    wrong = [entry for entry in entries if entry is not None and re.fullmatch(rule.limit, str(entry)) is None]
    if not wrong:
        return ""
    return f"{rule.key} is {_shown(wrong[0])}, and must match {rule.limit}"


def _missing(rule: PolicyRule, judged: Judged) -> str:
    if _value(rule.key, judged) not in (None, "", [], {}):
        return ""
    return f"{rule.key} must be set"


def _forbidden(rule: PolicyRule, judged: Judged) -> str:
    return f"{rule.key} must not be set" if judged.is_set(rule.key) else ""


def _elsewhere(rule: PolicyRule, judged: Judged) -> str:
    place = _place_on_disk(rule.key, judged)
    if place is None:
        return ""
    try:
        folders = [str(plain(with_variables(folder, _environment()))) for folder in rule.limit]
    except Unset as unset:
        return f"{rule.key}: the policy needs the variable {unset.name}, which is not set here"
    if any(_is_in(place, folder) for folder in folders):
        return ""
    return f"{rule.key} is {place}, and must lie in {listed(folders, ' or ')}"


def _environment() -> dict[str, str]:
    """The variables here; the user's name and home are the system's, whatever a shell says."""
    import pwd

    try:
        own = pwd.getpwuid(os.getuid())
    except KeyError:  # a user without an entry, as in containers
        return dict(os.environ)
    return {**os.environ, "USER": own.pw_name, "LOGNAME": own.pw_name, "HOME": own.pw_dir}


def _anothers(rule: PolicyRule, judged: Judged) -> str:
    place = _place_on_disk(rule.key, judged)
    folders = [folder for folder in rule.limit if place is not None and _is_in(place, folder)]
    if not folders:
        return ""
    inner = max(folders, key=len)
    owners = rule.limit[inner]
    if not {*owners}.isdisjoint(_who_we_are()):
        return ""
    return f"{rule.key} is {place}, and {inner} is of {listed(owners) or 'nobody'}"


def _place_on_disk(key: str, judged: Judged) -> str | None:
    """Where a path leads, links followed; an address as it is; None for none, or one in the run's own directory."""
    value = _value(key, judged)
    if not isinstance(value, str) or not value or in_run_dir(value):
        return None
    return value if scheme(value) is not None else os.path.realpath(absolute(value))


def _is_in(place: str, folder: str) -> bool:
    """Whether a place is a folder, or in it."""
    if scheme(folder) is None:
        folder = os.path.realpath(absolute(folder))
    folder = folder.rstrip("/")
    return place == folder or place.startswith(f"{folder}/")


def _who_we_are() -> set[str]:
    """This user's name, and the names of all groups, each behind an @."""
    import grp
    import pwd

    names = set()
    try:
        names.add(pwd.getpwuid(os.getuid()).pw_name)
    except KeyError:  # a user without an entry, as in containers
        names.add(str(os.getuid()))
    for group in {os.getgid(), *os.getgroups()}:
        try:
            names.add(f"@{grp.getgrgid(group).gr_name}")
        except KeyError:
            names.add(f"@{group}")
    return names


_SHAPES: dict[str, Callable[[PolicyRule, Judged], str]] = {
    "max": _over,
    "min": _less,
    "multiple_of": _no_multiple,
    "allowed": _not_allowed,
    "matches": _no_match,
    "required": _missing,
    "forbidden": _forbidden,
    "under": _elsewhere,
    "owners": _anothers,
}
