"""Texts that get their type from their field: of overrides, of variables, and numbers with a unit."""

from __future__ import annotations

import re
from typing import Any

from dfmspec.diagnostics import COMMAND_LINE
from dfmspec.read.document import parse_document, read_scalar
from dfmspec.read.interpolation import Typeless
from dfmspec.spec.catalogue import Catalogue, types
from dfmspec.spec.units import with_unit

_QUOTED = r"""(?s)(['"])((?:\\.|(?!\1)[^\\])*)\1"""
_FOR_PEOPLE = ("integer", "number")
"""Types whose values may have a unit."""


def unquoted(value: str) -> str | None:
    """What Hydra reads in quotes, which is always text; None when the value has none."""
    match = re.fullmatch(_QUOTED, value)
    if match is None:
        return None
    quote, inside = match.groups()
    return inside.replace(f"\\{quote}", quote)


def plain(value: Any) -> Any:
    """A value of a layer; of one that has no type yet, its text."""
    if isinstance(value, Typeless):
        return value.text
    return value


def typed(node: Any, legal: Catalogue, path: tuple[str, ...] = ()) -> Any:
    """The data of a layer, with each text as the type of its field has it."""
    if isinstance(node, dict):
        return {key: typed(value, legal, (*path, key)) for key, value in node.items()}
    if not isinstance(node, str | Typeless):
        return node
    field = legal.field(".".join(path))
    if field is None:  # an entry of a mapping
        field = (legal.field(".".join(path[:-1])) or {}).get("additionalProperties")
    if not isinstance(field, dict):
        field = {}
    value = _typed(node.text, types(field)) if isinstance(node, Typeless) else node
    return _in_units(value, field)


def _typed(text: str, declared: tuple[str, ...]) -> Any:
    """A text without a type, for a field of some types: for one that takes text, 8 is a text too."""
    if text in ("null", "~") or "string" not in declared:
        return _flow(text)
    # Such as run.resume, a word or an iteration.
    if "integer" in declared:
        number = read_scalar(text)
        if isinstance(number, int):
            return number
    return text


def _flow(text: str) -> Any:
    """A scalar, or a list or mapping in flow style."""
    if not text.startswith(("[", "{")):
        return read_scalar(text)
    # Bytes of the command line that are no UTF-8 are a problem of the document, and leave the text as it is.
    document = parse_document(f"value: {text}".encode(errors="surrogateescape"), COMMAND_LINE)
    if document.problems:
        return text
    return document.data["value"]


def _in_units(value: Any, field: dict[str, Any]) -> Any:
    """A text such as 20k or 4h as the number that it means for a field; any other value as it is."""
    if not isinstance(value, str) or not value[:1].isdigit():
        return value
    declared = types(field)
    is_number = "string" not in declared and any(name in declared for name in _FOR_PEOPLE)
    if not is_number and "x-unit" not in field:
        return value
    number = with_unit(value, field)
    return value if number is None else number


def as_field(key: str, value: Any, legal: Catalogue) -> Any:
    """A value as the field of a key has it: 20k, of train.train_iters, is 20000."""
    return canonical(typed(value, legal, tuple(key.split("."))), legal.field(key) or {})


def canonical(value: Any, field: dict[str, Any]) -> Any:
    """A number field's integer as a float."""
    # To Python, true is an integer.
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if "number" in types(field):
        return float(value)
    return value
