"""The legal keys of a target, read from its JSON Schema: the same file that editors and the structural stage read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from dfmspec.resources import resource


class Catalogue(NamedTuple):
    """Sections, fields, types and defaults of one target."""

    schema: dict[str, Any]

    def field(self, key: str) -> dict[str, Any] | None:
        """The schema of `section.field`, or of a top-level key; None when there is no such key."""
        node = self.schema
        for part in key.split("."):
            if "properties" not in node or (inner := node["properties"].get(part)) is None:
                return None
            node = inner
        return node

    def is_section(self, key: str) -> bool:
        """Whether a top-level key is a section with fields."""
        node = self.field(key)
        return node is not None and "properties" in node

    def fields(self, section: str) -> tuple[str, ...]:
        """The fields of a section."""
        node = self.field(section)
        return tuple(node.get("properties", {})) if node else ()

    @property
    def top_level(self) -> tuple[str, ...]:
        """Sections and top-level keys."""
        return tuple(self.schema["properties"])

    def defaults(self) -> Iterator[tuple[str, Any]]:
        """(key, default) of every field, None where it is derived or absent."""
        for name, node in self.schema["properties"].items():
            if "properties" in node:
                for field, inner in node["properties"].items():
                    yield f"{name}.{field}", inner.get("default")
            else:
                yield name, node.get("default")


@lru_cache
def catalogue_of(schema: str) -> Catalogue:
    """The catalogue that a schema among the package's files holds."""
    return Catalogue(json.loads(resource(schema).read_text()))


def types(field: dict[str, Any]) -> tuple[str, ...]:
    """The JSON types that a field takes."""
    declared = field.get("type", ())
    return (declared,) if isinstance(declared, str) else tuple(declared)
