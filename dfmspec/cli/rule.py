"""dfmspec rule and explain: the manual of a rule, and of a key."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfmspec.cli.arguments import check_format, complete_code, complete_key, complete_target, keys_of_targets
from dfmspec.errors import UsageError
from dfmspec.read.load import unaliased
from dfmspec.read.structure import SHORT_NAMES
from dfmspec.resources import resource
from dfmspec.spec.catalogue import types
from dfmspec.spec.units import in_words
from dfmspec.targets import TARGETS, catalogue

if TYPE_CHECKING:
    from dfmspec.check.rules.base import Rule

EXPLAIN_FORMATS = ("text", "json")
FORMATS = ("markdown", "json")
_LISTED_FORMATS = ", ".join(FORMATS)

_Code = Annotated[
    str | None,
    typer.Argument(
        help="A rule's code or name, or the letters of a family; without one, all are listed.",
        autocompletion=complete_code,
        show_default=False,
    ),
]
_Target = Annotated[
    str | None,
    typer.Option(help="Of the list, the rules for this target.", autocompletion=complete_target),
]
_OfKey = Annotated[
    str | None,
    typer.Option("--key", help="Of the list, the rules that look at this key.", autocompletion=complete_key),
]
_Format = Annotated[
    str,
    typer.Option("--format", help=f"How to print it: {_LISTED_FORMATS}."),
]
_ExplainFormat = Annotated[
    str,
    typer.Option("--format", help=f"How to print it: {', '.join(EXPLAIN_FORMATS)}."),
]
_Key = Annotated[
    str,
    typer.Argument(help="A key, such as train.global_batch_size, or a section.", autocompletion=complete_key),
]


def rule(code: _Code = None, target: _Target = None, of_key: _OfKey = None, format_: _Format = "markdown") -> None:
    """Print the manual of a rule, or list the rules.

    It tells what happens, a spec on which the rule fires, and one on which it does not.

    Example: dfmspec rule PAR101
    """
    form = check_format(format_, FORMATS)
    from dfmspec.check.rules import LETTERS, RULES

    if code is not None and code.upper() in LETTERS and form == "markdown":
        _list(_of([each for each in RULES if each.code.startswith(code.upper())], target, of_key))
        return
    if code is not None and (target or of_key):
        raise UsageError("--target and --key choose from the list; leave the code out")
    chosen = _of(_rules_named(code), target, of_key)
    if form == "json":
        known = json.loads(resource("schemas/rules.json").read_text())
        entries = [known[each.code] for each in chosen]
        typer.echo(json.dumps(entries if code is None else entries[0], indent=2))
    elif code is None:
        _list(chosen)
    else:
        page = resource(f"docs/rules/{chosen[0].code}.md")
        typer.echo(page.read_text(), nl=False)


def _of(rules: list[Rule], target: str | None, key: str | None) -> list[Rule]:
    """The rules for a target, and those that look at a key.

    Raises:
        UsageError: there is no such target, or no target has the key.
    """
    if target is not None:
        if target not in TARGETS:
            raise UsageError(f"--target {target}: one of {', '.join(TARGETS)}")
        rules = [rule for rule in rules if target in rule.targets]
    if key is not None:
        meant = unaliased(SHORT_NAMES.get(key, key))
        _known_targets(meant)
        codes = _codes_for(meant)
        rules = [rule for rule in rules if rule.code in codes]
    return rules


def _list(rules: list[Rule]) -> None:
    """The rules by their families, a line each."""
    from dfmspec.check.rules import LETTERS

    for letters, title in LETTERS.items():
        family = [rule for rule in rules if rule.code.startswith(letters)]
        if family:
            typer.echo(f"{letters}  {title}")
            for each in family:
                typer.echo(f"  {each.code}  {each.severity.label:<7}  {each.name}")


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
    if _is_a_key(code):
        advice = f"that is a key: dfmspec explain {code}, or dfmspec rule --key {code}"
    raise UsageError(f"there is no rule {code}; {advice}")


def _is_a_key(word: str) -> bool:
    """Whether some target has a key or a section of this name."""
    return any(catalogue(target).field(unaliased(SHORT_NAMES.get(word, word))) is not None for target in TARGETS)


def _codes_for(key: str) -> list[str]:
    """The rules that look at a key, or at a key of a section."""
    codes: dict[str, None] = {}
    for known, rules in json.loads(resource("schemas/rules_of_keys.json").read_text()).items():
        if known == key or known.startswith(f"{key}."):
            codes.update(dict.fromkeys(rules))
    return list(codes)


def explain(key: _Key, format_: _ExplainFormat = "text") -> None:
    """Print what a key means: type, default, what it follows from, which rules look at it.

    Targets that agree are told of together.

    Example: dfmspec explain scheduler.lr_decay_iters
    """
    form = check_format(format_, EXPLAIN_FORMATS)
    key = unaliased(SHORT_NAMES.get(key, key))
    known = _known_targets(key)
    if form == "json":
        found = {"schema_version": 1, "key": key, "rules": _codes_for(key), "targets": known}
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(key)
    is_section = any("properties" in field for field in known.values())
    rules = [] if is_section else _codes_for(key)
    if rules:
        for line in _wrapped(f"looked at by: {', '.join(rules)}"):
            typer.echo(line)

    # What is the same for several targets, once.
    told: dict[tuple[str, ...], list[str]] = {}
    for target, field in known.items():
        told.setdefault(tuple(_field_lines(field)), []).append(target)
    for lines, targets in told.items():
        typer.echo(f"\ntarget {', '.join(targets)}")
        for line in lines:
            for part in _wrapped(line):
                typer.echo(part)


_WIDTH = 100
"""The most that a line of a manual has; a narrower terminal has its own."""


def _wrapped(line: str) -> list[str]:
    """A line in lines of the terminal's width, indented."""
    import shutil
    import textwrap

    width = min(_WIDTH, shutil.get_terminal_size().columns)
    return textwrap.wrap(
        line, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )


def _known_targets(key: str) -> dict[str, dict[str, Any]]:
    """The targets that have a key, each with its entry in the catalogue.

    Raises:
        UsageError: none has it.
    """
    known: dict[str, dict[str, Any]] = {}
    for target in TARGETS:
        field = catalogue(target).field(key)
        if field is not None:
            known[target] = field
    if not known:
        raise UsageError(f"there is no key {key}; {_advice_for(key)}")
    return known


def _advice_for(key: str) -> str:
    """What to try instead of a key that no target has: a rule of that name, keys that begin alike, near spellings."""
    from dfmspec.check.rules import RULES

    if any(key.upper() == rule.code or key == rule.name for rule in RULES):
        return f"that is a rule: dfmspec rule {key}"
    names = keys_of_targets()
    close = [name for name in names if name.startswith(key)]
    close += [name for name in names if name.endswith(f".{key}")]
    section, dot, begun = key.partition(".")
    if dot and not close:
        close = sorted(
            (name for name in names if name.startswith(f"{section}.{begun[:3]}")),
            key=lambda name: -sum(one == other for one, other in zip(name, key, strict=False)),
        )
    if not close:
        close = get_close_matches(key, names, n=_OFFERED, cutoff=0.5)
    if not close:
        return "dfmspec schema lists them"
    return f"did you mean {', '.join(close[:_OFFERED])}?"


_OFFERED = 4
"""How many keys are offered instead of one."""


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
        return [*lines, f"keys: {keys}"]
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
    if "x-unit" in field:
        words.append(f"written as {in_words(field)}")
    return ", ".join(words)
