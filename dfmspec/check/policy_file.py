"""A site's policy as a file: which ones hold here, and whether each rule can ever say something.

It is `policy.yaml` in the site's folder, and the file that DFMSPEC_POLICY names; where both say something of a key,
both hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dfmspec.check.rules.base import as_yaml, listed
from dfmspec.check.rules.policies import MALFORMED, RULE_OF
from dfmspec.diagnostics import Diagnostic, Severity, Span
from dfmspec.errors import UsageError
from dfmspec.read.document import Document, read_document
from dfmspec.read.scalars import as_field, plain
from dfmspec.read.sites import site_policies
from dfmspec.resources import resource
from dfmspec.spec.catalogue import types
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
        stat = Path(file).stat()
    except OSError:  # which reading it tells
        return _policy_of(file, 0, 0)
    return _policy_of(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=8)
def _policy_of(file: str, modified: int, size: int) -> Policy:
    """A policy as it is at this moment: it holds for many specs and cells, and is read once."""
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
    return any(number(typed(key, limit, target)) is not None for target, _ in _fields(key))


def _may_be(key: str, value: Any) -> bool:
    """Whether some target's key may have a value, or an entry of its list."""
    if key in COMPUTED:
        return isinstance(value, int | float)
    return any(_fits(typed(key, value, target), field) for target, field in _fields(key))


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


# What a rule compares with.


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


def typed(key: str, value: Any, target: str) -> Any:
    """A value of a policy as the field of its key has it: 24h, of a time limit, is 1-00:00:00."""
    return value if key in COMPUTED else plain(as_field(key, value, catalogue(target)))


def number(value: Any) -> float | None:
    """A number; of a time as Slurm writes it, its minutes."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    try:
        return minutes_of(value)
    except (ValueError, AttributeError):
        return None
