"""The JSON Schemas of what dfmspec writes for programs, beside the manifest's: findings, plans and events."""

from __future__ import annotations

from typing import Any

from dfmspec import __version__
from dfmspec.diagnostics import Severity
from dfmspec.plan.plan import FORMAT_VERSION
from dfmspec.record.events import needed_fields
from dfmspec.targets import TARGETS

Node = dict[str, Any]
_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_DIGEST = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
_JSON_TYPES = {int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}


def _document(name: str, title: str, body: Node) -> Node:
    return {
        "$schema": _DRAFT,
        "$id": f"https://dfmspec.dev/schemas/{__version__}/{name}.schema.json",
        "title": title,
        **body,
    }


def _object(properties: dict[str, Node], **others: Any) -> Node:
    """An object with all of these; a later version may add more."""
    return {"type": "object", "required": list(properties), "properties": properties, **others}


def findings() -> Node:
    """What `validate --format json` prints; a line of jsonl is one of its findings."""
    finding = _object(
        {
            "file": {**_TEXT, "description": 'As it was named; or "<command line>", "<defaults>", "<stdin>".'},
            "line": {**_COUNT, "description": "From 1; 0: the file as a whole."},
            "column": _COUNT,
            "end_line": _COUNT,
            "end_column": {**_COUNT, "description": "Exclusive."},
            "severity": {"enum": [severity.label for severity in Severity]},
            "code": {"type": "string", "pattern": "^[A-Z]{3}[0-9]{3}$"},
            "name": _TEXT,
            "message": _TEXT,
            "hint": _TEXT,
            "path": {**_TEXT, "description": "The key, dotted; an index of a list among its parts."},
            "layer": {**_TEXT, "description": "What set the value, when that is not the spec itself."},
            "suppressed": {"type": ["string", "null"], "description": 'The reason, or "baseline"; null: it counts.'},
        }
    )
    body = _object(
        {
            "schema_version": {"const": 1},
            "tool": _object({"name": {"const": "dfmspec"}, "version": _TEXT}),
            "findings": {"type": "array", "items": finding},
        }
    )
    return _document("findings", "Findings of dfmspec validate", body)


def plan() -> Node:
    """plan.json of a bundle or of a run."""
    body = _object(
        {
            "plan_id": {**_DIGEST, "description": "Of the canonical JSON of what is hashed."},
            "format_version": {"enum": list(range(1, FORMAT_VERSION + 1))},
            "name": _TEXT,
            "target": {"enum": list(TARGETS)},
            "config": {"type": "object", "description": "What config.yaml holds, by section."},
            "nnodes": {"type": "integer", "minimum": 1},
            "command": {"type": "array", "items": _TEXT, "description": "What every node runs."},
            "gpus_per_node": _COUNT,
            "env": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
            "run": {"type": "object"},
            "launcher": {"type": "object"},
            "launch": {**_DIGEST, "description": "Of run and launcher, which are beside the identity."},
            "spec_dir": {"type": ["string", "null"], "description": "The spec's folder, as seen from this file."},
        }
    )
    body["properties"]["revision"] = {**_TEXT, "description": "From format 2 on: of the target's code."}
    body["properties"]["guards"] = {"type": "object", "description": "In format 1; since then in guards.json."}
    return _document("plan", "plan.json of dfmspec", body)


def events() -> Node:
    """A line of events.jsonl."""
    kinds = []
    for kind, fields in needed_fields().items():
        properties: dict[str, Node] = {"type": {"const": kind}, "time": {"type": "number"}}
        for name, types in fields.items():
            declared = types if isinstance(types, tuple) else (types,)
            names = sorted({_JSON_TYPES[each] for each in declared})
            properties[name] = {"type": names[0] if len(names) == 1 else names}
        kinds.append(_object(properties))
    return _document("events", "A line of events.jsonl", {"oneOf": kinds})
