"""dfmspec schema: the JSON Schemas."""

from __future__ import annotations

from typing import Annotated

import typer

from dfmspec.errors import UsageError
from dfmspec.resources import resource
from dfmspec.targets import TARGETS

_NAMES = {
    "experiment": "schemas/experiment.schema.json",
    **{name: entry.schema for name, entry in TARGETS.items()},
    "manifest": "schemas/manifest.schema.json",
}
"""Each schema, and its file among the package's."""
_LISTED = ", ".join(_NAMES)

_Name = Annotated[
    str,
    typer.Argument(help=f"One of: {_LISTED}."),
]


def schema(name: _Name = "experiment") -> None:
    """Print a JSON Schema, for editors and other tools.

    In a spec, for yaml-language-server: # yaml-language-server: $schema=schemas/experiment.schema.json
    """
    if name not in _NAMES:
        raise UsageError(f"there is no schema {name!r}; known: {_LISTED}")
    typer.echo(resource(_NAMES[name]).read_text(), nl=False)
