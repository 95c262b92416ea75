"""dfmspec rule and explain: the manual of a rule, and of a key."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from dfmspec.cli.arguments import check_format, complete_code, complete_key
from dfmspec.errors import UsageError
from dfmspec.read.load import unaliased
from dfmspec.read.structure import SHORT_NAMES
from dfmspec.resources import resource
from dfmspec.spec.catalogue import types
from dfmspec.targets import TARGETS, catalogue

FORMATS = ("markdown", "json")


def rule(
    code: Annotated[
        str | None, typer.Argument(help="A rule's code or name; without one, all are listed.", autocompletion=complete_code, show_default=False)
    ] = None,
    format_: Annotated[str, typer.Option("--format", help=f"How to print it: {', '.join(FORMATS)}.")] = "markdown",
) -> None:
    """Print the manual of a rule: what happens, a spec on which it fires, and one on which it does not.

    Example: dfmspec rule PAR101
    """
    from dfmspec.check.rules import RULES

    form = check_format(format_, FORMATS)
    chosen = [rule for rule in RULES if code is None or code.upper() == rule.code or code == rule.name]
    if not chosen:
        close = get_close_matches(str(code), [name for rule in RULES for name in (rule.code, rule.name)], n=1)
        raise UsageError(f"there is no rule {code}" + (f"; did you mean {close[0]}?" if close else "; dfmspec rule lists them"))
    if form == "json":
        fields = ("code", "name", "targets", "level", "why", "source")
        entries = [{**{field: getattr(rule, field) for field in fields}, "severity": rule.severity.label} for rule in chosen]
        typer.echo(json.dumps(entries if code is None else entries[0], indent=2))
    elif code is None:
        for each in chosen:
            typer.echo(f"{each.code}  {each.severity.label:<7}  {each.name}")
    else:
        typer.echo(resource(f"docs/rules/{chosen[0].code}.md").read_text(), nl=False)


def explain(key: Annotated[str, typer.Argument(help="A key, such as train.global_batch_size.", autocompletion=complete_key)]) -> None:
    """Print what a key means, for each target that has it: type, default, what it follows from, which rules look at it.

    Example: dfmspec explain scheduler.lr_decay_iters
    """
    key = unaliased(SHORT_NAMES.get(key, key))
    known = {target: field for target in TARGETS if (field := catalogue(target).field(key)) is not None}
    if not known:
        names = sorted({name for target in TARGETS for name, _ in catalogue(target).defaults()})
        close = get_close_matches(key, names, n=3, cutoff=0.5) or [name for name in names if name.endswith(f".{key}")]
        raise UsageError(f"there is no key {key}" + (f"; did you mean {', '.join(close)}?" if close else "; dfmspec schema lists them"))
    typer.echo(key)
    if rules := json.loads(resource("schemas/rules_of_keys.json").read_text()).get(key):
        typer.echo(f"  looked at by: {', '.join(rules)}")
    for target, field in known.items():
        typer.echo("\n".join(["", f"target {target}", *(f"  {line}" for line in described(key, field))]))


def described(key: str, field: dict[str, Any]) -> list[str]:
    """A field of a catalogue in lines."""
    if "properties" in field:
        return [field.get("description", ""), f"a section; its keys: {', '.join(field['properties'])}"]
    lines = [field.get("description", ""), f"type: {type_words(field)}"]
    default = field.get("default")
    if default is not None or "x-derived" not in field:
        lines.append(f"default: {json.dumps(default)}")
    facts = (
        ("x-upstream", "upstream's own value: "), ("x-derived", "derived: "), ("x-no-effect", "has no effect: "),
        ("x-overwritten-by", "overwritten at start by: "),
    )  # fmt: skip
    lines += [words + (field[name] if isinstance(field[name], str) else json.dumps(field[name])) for name, words in facts if name in field]
    return lines


def type_words(field: dict[str, Any]) -> str:
    """The type of a field for people: "integer, at least 1"."""
    if "x-callable" in field:
        return "a function, which no file can give"
    if "enum" in field:
        return "one of " + ", ".join("null" if value is None else str(value) for value in field["enum"])
    limits = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "less than"}
    return ", ".join([" or ".join(types(field)), *(f"{words} {field[name]}" for name, words in limits.items() if name in field)])
