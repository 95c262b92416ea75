"""A site's policy: limits, allowed and required values, forbidden keys and owners of paths, as data.

It is `policy.yaml` in the site's folder, and the file that DFMSPEC_POLICY names; where both say something of a key,
both hold. Its findings are of family POL, which no comment, option or baseline takes out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from dfmspec.check.rules import diagnostic_of
from dfmspec.check.rules.base import as_yaml, listed
from dfmspec.check.rules.policies import MALFORMED, RULE_OF
from dfmspec.diagnostics import Diagnostic, Finding, Severity, Span
from dfmspec.errors import UsageError
from dfmspec.read.document import Document, read_document
from dfmspec.read.interpolation import Unset, with_variables
from dfmspec.read.resolve import Resolved
from dfmspec.read.scalars import as_field, plain
from dfmspec.read.sites import is_the_sites, site_policies, site_profiles
from dfmspec.resources import resource
from dfmspec.spec.catalogue import types
from dfmspec.spec.paths import absolute, in_run_dir, scheme
from dfmspec.targets import TARGETS, catalogue, minutes_of

VARIABLE = "DFMSPEC_POLICY"
"""Names a policy that holds beside the site's own."""

Values = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class PolicyRule:
    """One entry of a policy, for one key."""

    key: str
    shape: str
    """Which of the nine shapes: "max", "allowed", ..."""
    limit: Any
    """What the shape compares with."""
    when: Mapping[str, Any]
    severity: Severity
    why: str
    place: Span


class Policy(NamedTuple):
    """A policy, and what is wrong with its file."""

    document: Document
    rules: tuple[PolicyRule, ...]
    tests: tuple[Mapping[str, Any], ...]
    contact: str
    problems: tuple[Diagnostic, ...]


class Judged(NamedTuple):
    """What a policy looks at: of a spec, or of a plan."""

    target: str
    values: Values
    is_set: Callable[[str], bool]
    """Whether a person set a key, other than the site itself in a profile."""


# Which policies there are.


def policies() -> list[Policy]:
    """The policies that hold here, read.

    Raises:
        UsageError: the file that DFMSPEC_POLICY names is not there.
    """
    files = [str(file) for file in site_policies()]
    named = os.environ.get(VARIABLE)
    if named:
        if not os.path.lexists(named):
            raise UsageError(f"{VARIABLE}: {named} is not there; name a policy.yaml, or unset it")
        files.append(named)
    return [policy_of(file) for file in dict.fromkeys(files)]


def policy_of(file: str) -> Policy:
    """A policy's file, read and checked; what is wrong with it is a finding: no rule is left out in silence."""
    try:
        document = read_document(file)
    except OSError as error:
        where = Document(file, "")
        reason = error.strerror or str(error)
        return Policy(where, (), (), "", (_malformed(where, (), f"the policy cannot be read: {reason}"),))
    problems = list(document.problems)
    if document.data is None or problems:
        problems.append(_malformed(document, (), "the policy is no YAML"))
        return Policy(document, (), (), "", tuple(problems))
    data = document.data
    for fault in _validator().iter_errors(data):
        problems.append(_malformed(document, tuple(fault.instance_path), _said(fault)))
    if problems:
        return Policy(document, (), (), "", tuple(problems))

    rules: list[PolicyRule] = []
    for index, entry in enumerate(data["rules"]):
        for one in _rules_of(entry, document.values.get(("rules", index)) or document.span(("rules",))):
            useless = _fault_of(one)
            if useless:
                problems.append(_malformed(document, ("rules", index), useless))
            else:
                rules.append(one)
    return Policy(document, tuple(rules), tuple(data.get("tests", ())), data.get("contact", ""), tuple(problems))


@lru_cache
def _validator() -> Any:
    import json

    import jsonschema_rs

    return jsonschema_rs.validator_for(json.loads(resource("schemas/policy.schema.json").read_text()))


def _said(error: Any) -> str:
    """What the schema says of an entry, in words."""
    message = str(error.message)
    if "oneOf" in message or "valid under" in message:
        return f"a rule has exactly one of {listed(RULE_OF)}"
    return message[:200]


def _malformed(document: Document, path: tuple[str | int, ...], message: str) -> Diagnostic:
    place = document.values.get(path) or document.span(path)
    return Diagnostic(
        place,
        MALFORMED.code,
        MALFORMED.name,
        MALFORMED.severity,
        message,
        "no spec is judged by it until it is mended; dfmspec policy test tells when it is",
    )


def _rules_of(entry: Mapping[str, Any], place: Span) -> Iterator[PolicyRule]:
    """An entry, as one rule a key."""
    shape = next(name for name in RULE_OF if name in entry)
    keys = entry["key"] if isinstance(entry["key"], list) else [entry["key"]]
    for key in keys:
        yield PolicyRule(
            key=key,
            shape=shape,
            limit=entry[shape],
            when=entry.get("when", {}),
            severity=Severity[entry.get("severity", "error").upper()],
            why=entry.get("why", ""),
            place=place,
        )


def _fault_of(rule: PolicyRule) -> str:
    """What makes a rule of no use: a key that no target has, or something that no value of the key compares with."""
    for key in (rule.key, *rule.when):
        if key not in COMPUTED and not any(_is_a_field(key, target) for target in TARGETS):
            return f"no target has a key {key}; dfmspec explain {key} tells what is near"
    for key, wanted in rule.when.items():
        for each in wanted if isinstance(wanted, list) else [wanted]:
            if not _may_be(key, each):
                return f"when: {key} is never {as_yaml(each)}"
    return _unfit(rule)


def _is_a_field(key: str, target: str) -> bool:
    legal = catalogue(target)
    return legal.field(key) is not None and not legal.is_section(key)


def _unfit(rule: PolicyRule) -> str:
    """Why a shape does not fit its key."""
    key = rule.key
    limit = rule.limit
    if rule.shape in ("max", "min", "multiple_of"):
        is_counted = key in COMPUTED or _takes(key, "integer", "number") or key == "launcher.time_limit"
        if not is_counted or (key not in COMPUTED and not _is_a_limit(key, limit)):
            return f"{rule.shape} {as_yaml(limit)}: no value of {key} compares with it"
    elif rule.shape in ("under", "owners"):
        if not _takes(key, "string"):
            return f"{rule.shape}: {key} is no path"
    elif rule.shape == "allowed":
        never = [each for each in limit if key not in COMPUTED and not _may_be(key, each)]
        if never:
            return f"allowed: {key} is never {as_yaml(never[0])}"
    elif rule.shape == "matches":
        try:
            re.compile(limit)
        except re.error as error:
            return f"{limit!r} is no regular expression: {error}"
    return ""


def _fields(key: str) -> list[tuple[str, dict[str, Any]]]:
    """The key's field of each target that has it."""
    found = [(target, catalogue(target).field(key)) for target in TARGETS]
    return [(target, field) for target, field in found if field is not None]


def _takes(key: str, *names: str) -> bool:
    return any({*names} & {*types(field)} for _, field in _fields(key))


def _is_a_limit(key: str, limit: Any) -> bool:
    return any(_number(_typed(key, limit, target)) is not None for target, _ in _fields(key))


def _may_be(key: str, value: Any) -> bool:
    """Whether some target's key may have a value, or an entry of its list."""
    if key in COMPUTED:
        return isinstance(value, int | float)
    return any(_fits(_typed(key, value, target), field) for target, field in _fields(key))


_NAMES = {bool: ("boolean",), int: ("integer", "number"), float: ("number",), str: ("string",)}
"""What JSON calls a value of a type."""


def _fits(value: Any, field: dict[str, Any]) -> bool:
    if "enum" in field:
        return value in field["enum"]
    if value is None:
        return True
    declared = types(field)
    if "array" in declared and not isinstance(value, list):
        return True
    return bool({*_NAMES.get(type(value), ())} & {*declared}) or not declared


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
        if _value(key, judged) not in [_typed(key, each, judged.target) for each in allowed]:
            return False
    return True


def _is_stricter(one: PolicyRule, other: PolicyRule, target: str) -> bool:
    """Whether a limit leaves less room than another one of the same key and shape."""
    if one.shape not in ("max", "min"):
        return False
    mine, its = (_number(_typed(rule.key, rule.limit, target)) or 0 for rule in (one, other))
    return mine < its if one.shape == "max" else mine > its


# Values.


def _gpus(values: Values) -> Any:
    """Processes, one a GPU, of all nodes."""
    return values["cluster.nnodes"] * values["cluster.nproc_per_node"]


def _gpu_hours(values: Values) -> Any:
    """GPU hours of an attempt, where it has a limit."""
    minutes = minutes_of(values.get("launcher.time_limit"))
    return None if minutes is None else _gpus(values) * minutes / 60


COMPUTED: dict[str, Callable[[Values], Any]] = {
    "cluster.gpus": _gpus,
    "cluster.gpu_hours": _gpu_hours,
}
"""What follows from several keys, and is no key of a spec."""


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


def _typed(key: str, value: Any, target: str) -> Any:
    """A value of a policy as the field of its key has it: 24h, of a time limit, is 1-00:00:00."""
    return value if key in COMPUTED else plain(as_field(key, value, catalogue(target)))


def _number(value: Any) -> float | None:
    """A number; of a time as Slurm writes it, its minutes."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    try:
        return minutes_of(value)
    except (ValueError, AttributeError):
        return None


# The shapes: each says what is wrong, or nothing.


def _over(rule: PolicyRule, judged: Judged) -> str:
    return _beyond(rule, judged, lambda value, limit: value > limit, "at most")


def _less(rule: PolicyRule, judged: Judged) -> str:
    return _beyond(rule, judged, lambda value, limit: value < limit, "at least")


def _beyond(rule: PolicyRule, judged: Judged, is_beyond: Callable[[float, float], bool], words: str) -> str:
    value = _value(rule.key, judged)
    number = _number(value)
    limit = _number(_typed(rule.key, rule.limit, judged.target))
    if number is None or limit is None or not is_beyond(number, limit):
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
    allowed = [_typed(rule.key, each, judged.target) for each in rule.limit]
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
