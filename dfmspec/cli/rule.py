"""dfmspec rule and explain: the manual of a rule, and of a key."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmspec.cli.arguments import check_format, complete_code, complete_key, keys_of_targets
from dfmspec.errors import UsageError
from dfmspec.read.load import unaliased
from dfmspec.read.structure import SHORT_NAMES
from dfmspec.resources import resource
from dfmspec.spec.catalogue import types
from dfmspec.targets import TARGETS, catalogue

if TYPE_CHECKING:
    from dfmspec.check.rules.base import Rule

FORMATS = ("markdown", "json")
_LISTED_FORMATS = ", ".join(FORMATS)

_Code = Annotated[
    str | None,
    typer.Argument(
        help="A rule's code or name; without one, all are listed.",
        autocompletion=complete_code,
        show_default=False,
    ),
]
_Format = Annotated[
    str,
    typer.Option("--format", help=f"How to print it: {_LISTED_FORMATS}."),
]
_Key = Annotated[
    str,
    typer.Argument(help="A key, such as train.global_batch_size.", autocompletion=complete_key),
]


def rule(code: _Code = None, format_: _Format = "markdown") -> None:
    """Print the manual of a rule, or list the rules.

    It tells what happens, a spec on which the rule fires, and one on which it does not.

    Example: dfmspec rule PAR101
    """
    form = check_format(format_, FORMATS)
    chosen = _rules_named(code)
    if form == "json":
        entries = [_rule_as_json(each) for each in chosen]
        typer.echo(json.dumps(entries if code is None else entries[0], indent=2))
    elif code is None:
        for each in chosen:
            typer.echo(f"{each.code}  {each.severity.label:<7}  {each.name}")
    else:
        page = resource(f"docs/rules/{chosen[0].code}.md")
        typer.echo(page.read_text(), nl=False)


def _rules_named(code: str | None) -> list[Rule]:
    """The rule of a code or a name; None: all of them.

    Raises:
        UsageError: there is none.
    """
    from dfmspec.check.rules import RULES

    if code is None:
        return list(RULES)
    chosen = [rule for rule in RULES if code.upper() == rule.code or code == rule.name]
    if chosen:
        return chosen
    names: list[str] = []
    for each in RULES:
        names += [each.code, each.name]
    close = get_close_matches(code, names, n=1)
    advice = f"did you mean {close[0]}?" if close else "dfmspec rule lists them"
    raise UsageError(f"there is no rule {code}; {advice}")


def _rule_as_json(rule: Rule) -> dict[str, Any]:
    """What a rule is, as data."""
    return {
        "code": rule.code,
        "name": rule.name,
        "targets": rule.targets,
        "level": rule.level,
        "why": rule.why,
        "source": rule.source,
        "severity": rule.severity.label,
    }


def explain(key: _Key) -> None:
    """Print what a key means: type, default, what it follows from, which rules look at it.

    Example: dfmspec explain scheduler.lr_decay_iters
    """
    # The key, under its own name.
    key = unaliased(SHORT_NAMES.get(key, key))
    known: dict[str, dict[str, Any]] = {}
    for target in TARGETS:
        field = catalogue(target).field(key)
        if field is not None:
            known[target] = field
    if not known:
        raise UsageError(f"there is no key {key}; {_advice_for(key)}")

    # What is the same for all targets, and what each says of it.
    typer.echo(key)
    rules_of_keys = json.loads(resource("schemas/rules_of_keys.json").read_text())
    rules = rules_of_keys.get(key)
    if rules:
        listed = ", ".join(rules)
        typer.echo(f"  looked at by: {listed}")
    for target, field in known.items():
        typer.echo(f"\ntarget {target}")
        for line in _field_lines(field):
            typer.echo(f"  {line}")


def _advice_for(key: str) -> str:
    """What to try instead of a key that no target has: a near spelling, or its name in a section."""
    names = keys_of_targets()
    close = get_close_matches(key, names, n=3, cutoff=0.5)
    if not close:
        close = [name for name in names if name.endswith(f".{key}")]
    if not close:
        return "dfmspec schema lists them"
    listed = ", ".join(close)
    return f"did you mean {listed}?"


_FACTS = {
    "x-upstream": "upstream's own value: ",
    "x-derived": "derived: ",
    "x-no-effect": "has no effect: ",
    "x-overwritten-by": "overwritten at start by: ",
}
"""Marks of a catalogue, and how they are said."""


def _field_lines(field: dict[str, Any]) -> list[str]:
    """A field of a catalogue in lines."""
    lines = [field.get("description", "")]
    if "properties" in field:
        keys = ", ".join(field["properties"])
        return [*lines, f"a section; its keys: {keys}"]
    lines.append(f"type: {type_words(field)}")
    lines.append(f"null: {null_words(field)}")

    # The null of a derived field is no default.
    default = field.get("default")
    if default is not None or "x-derived" not in field:
        lines.append(f"default: {json.dumps(default)}")
    for name, words in _FACTS.items():
        if name in field:
            fact = field[name]
            lines.append(words + (fact if isinstance(fact, str) else json.dumps(fact)))
    return lines


_LIMIT_WORDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
}


def null_words(field: dict[str, Any]) -> str:
    """What null does to a field, and what upstream's script was seen to do with one: "derived; upstream: rejected"."""
    words = str(field.get("x-null", "invalid"))
    seen = field.get("x-null-upstream")
    if seen is None:
        return words
    return f"{words}; upstream: {seen}"


def type_words(field: dict[str, Any]) -> str:
    """The type of a field for people: "integer, at least 1"."""
    if "x-callable" in field:
        return "a function, which no file can give"
    if "enum" in field:
        options = ", ".join("null" if value is None else str(value) for value in field["enum"])
        return f"one of {options}"
    words = [" or ".join(types(field))]
    for name, limit in _LIMIT_WORDS.items():
        if name in field:
            words.append(f"{limit} {field[name]}")
    return ", ".join(words)
