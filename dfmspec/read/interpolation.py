"""`${env:NAME}`, `${env:NAME:-default}` and `${spec.KEY}`: a small closed set of references, and no expressions.

Variables are filled in where a layer is read, keys once all layers lie on one another; the result is typed and checked
like a value that was written out. Any other `${...}` is left for the rules to judge, but for a run's own symbols.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

# Compiled when first asked for, which most specs never do.
_VARIABLE = r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(:-[^}]*)?\}"
_KEY = r"\$\{spec\.([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}"
SYNTAX = "${env:NAME}, ${env:NAME:-default} and ${spec.KEY}"
"""What a spec may refer to."""


class Typeless(NamedTuple):
    """A text that is read by the type of its field, once that is known: of an override, or of a variable."""

    text: str


_LONGEST = 65_536
"""Of a text with references filled in, which may refer to one another."""


class Unfit(Exception):
    """A value that no text can hold."""


class Unset(Exception):
    """A variable that is not there, and has no default."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def with_variables(text: str, environment: Mapping[str, str]) -> str | Typeless:
    """A text with the variables of the environment filled in; one that is nothing else has no type of its own.

    Raises:
        Unset: there is no such variable.
    """

    def value_of(match: re.Match[str]) -> str:
        name, default = match.groups()
        value = environment.get(name)
        # As in a shell, where :- is a default for what is empty, too.
        if default is not None:
            return value or default[2:]
        if value is None:
            raise Unset(name)
        return value

    filled = re.sub(_VARIABLE, value_of, text)
    return Typeless(filled) if re.fullmatch(_VARIABLE, text) else filled


def variables(text: str) -> list[str]:
    """The names of the variables that a text refers to."""
    return [name for name, _ in re.findall(_VARIABLE, text)]


def keys_in(value: Any) -> Iterator[str]:
    """The keys that a value refers to, however deep in lists and mappings."""
    for text in texts_in(value):
        yield from re.findall(_KEY, text)


def refers(value: Any) -> bool:
    """Whether a value refers to a key."""
    return next(keys_in(value), None) is not None


def with_keys(value: Any, of: Callable[[str], Any]) -> Any:
    """A value with the values of keys in the place of references; one that is nothing else gets the type of its field.

    Args:
        value: what a layer has.
        of: the value of a key.

    Raises:
        Unfit: a text cannot hold what it refers to, or becomes too long.
    """
    if isinstance(value, dict):
        return {name: with_keys(inner, of) for name, inner in value.items()}
    if isinstance(value, list):
        items = [with_keys(inner, of) for inner in value]
        return [item.text if isinstance(item, Typeless) else item for item in items]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(_KEY, value)
    if whole is not None:
        found = of(whole[1])
        return found if found is None or isinstance(found, list | dict) else Typeless(_as_text(found))
    text = re.sub(_KEY, lambda match: _inside(match[1], of(match[1])), value)
    if len(text) > _LONGEST:
        raise Unfit(f"its references make a text of more than {_LONGEST:,} letters")
    return text


def _inside(key: str, value: Any) -> str:
    """A value in the middle of a text."""
    if value is None or isinstance(value, list | dict):
        what = "null" if value is None else "no single value"
        raise Unfit(f"${{spec.{key}}} is {what}, which no text can hold")
    return _as_text(value)


def texts_in(value: Any) -> Iterator[str]:
    """The texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Typeless):
        yield value.text
    elif isinstance(value, dict):
        yield from texts_in([*value.values()])
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def _as_text(value: Any) -> str:
    """A value inside a text, as YAML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
