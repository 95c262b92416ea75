"""dfmspec schema: the JSON Schemas."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dfmspec.cli.arguments import complete_key
from dfmspec.errors import UsageError
from dfmspec.read.load import unaliased
from dfmspec.resources import resource
from dfmspec.targets import TARGETS, catalogue

_NAMES = {
    "experiment": "schemas/experiment.schema.json",
    **{name: entry.schema for name, entry in TARGETS.items()},
    "findings": "schemas/findings.schema.json",
    "plan": "schemas/plan.schema.json",
    "manifest": "schemas/manifest.schema.json",
    "events": "schemas/events.schema.json",
    "policy": "schemas/policy.schema.json",
}
"""Each schema, and its file among the package's."""
_LISTED = ", ".join(_NAMES)

_Name = Annotated[
    str,
    typer.Argument(help=f"One of: {_LISTED}."),
]
_Field = Annotated[
    str | None,
    typer.Option(help="Of a target, or of all: this key alone.", metavar="KEY", autocompletion=complete_key),
]


def schema(name: _Name = "experiment", field: _Field = None) -> None:
    """Print a JSON Schema, for editors and other tools.

    In a spec, for yaml-language-server: # yaml-language-server: $schema=.dfmspec/experiment.schema.json, a file beside
    the spec that `dfmspec init` writes, or `dfmspec schema`.
    """
    if name not in _NAMES:
        raise UsageError(f"there is no schema {name!r}; known: {_LISTED}")
    if field is None:
        typer.echo(resource(_NAMES[name]).read_text(), nl=False)
        return
    if name not in (*TARGETS, "experiment"):
        raise UsageError(f"--field is for the keys of a spec; leave {name} out")
    key = unaliased(field)
    targets = [name] if name in TARGETS else list(TARGETS)
    known = {target: catalogue(target).field(key) for target in targets}
    found = {target: node for target, node in known.items() if node is not None}
    if not found:
        raise UsageError(f"--field {field}: there is no such key; dfmspec explain {field} tells what is near")
    typer.echo(json.dumps(found.get(name, found), indent=2))
