"""The legal keys of a target, read from its JSON Schema: the same file that editors and the structural stage read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from dfmspec.resources import resource

MATRIX = "matrix"
PROFILE = "profile"
COMPOSITION = (PROFILE, "extends", "config_file", MATRIX)
"""Keys that say what a spec is made of; a configuration has none of them."""


class Catalogue(NamedTuple):
    """Sections, fields, types and defaults of one target."""

    schema: dict[str, Any]
    asked: dict[str, dict[str, Any] | None]
    """The fields that were asked for."""

    def field(self, key: str) -> dict[str, Any] | None:
        """The schema of `section.field`, or of a top-level key; None when there is no such key."""
        # A check asks for the same few hundred keys over and over.
        if key in self.asked:
            return self.asked[key]
        node: dict[str, Any] | None = self.schema
        for part in key.split("."):
            node = None if node is None else node.get("properties", {}).get(part)
        if node is not None:  # of others there is no end
            self.asked[key] = node
        return node

    def null_of(self, key: str) -> str:
        """What an explicit null does to a key.

        "kept": it means something, and what trains is given it; "derived": the key takes the value that follows from
        others; "default": as if the key were left out; "invalid": the key takes none.
        """
        node = self.field(key) or {}
        return str(node.get("x-null", "invalid"))

    def is_section(self, key: str) -> bool:
        """Whether a top-level key is a section with fields."""
        node = self.field(key)
        return node is not None and "properties" in node

    def fields(self, section: str) -> tuple[str, ...]:
        """The fields of a section."""
        node = self.field(section) or {}
        return tuple(node.get("properties", {}))

    @property
    def top_level(self) -> tuple[str, ...]:
        """Sections and top-level keys."""
        return tuple(self.schema["properties"])

    def defaults(self) -> Iterator[tuple[str, Any]]:
        """(key, default) of every field, None where it is derived or absent."""
        for name, node in self.schema["properties"].items():
            if "properties" not in node:
                yield name, node.get("default")
                continue
            for field, inner in node["properties"].items():
                yield f"{name}.{field}", inner.get("default")


@lru_cache
def catalogue_of(schema: str) -> Catalogue:
    """The catalogue that a schema among the package's files holds."""
    return Catalogue(json.loads(resource(schema).read_text()), {})


def types(field: dict[str, Any]) -> tuple[str, ...]:
    """The JSON types that a field takes."""
    # JSON Schema has a word for one type, and a list for several.
    declared = field.get("type", ())
    if isinstance(declared, str):
        return (declared,)
    return tuple(declared)
