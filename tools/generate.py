"""Writes what is generated: the schemas. `python tools/generate.py [--check]`; --check writes nothing and fails when stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from dfmspec.catalogue import SCHEMAS  # noqa: E402
from dfmspec.manifest import manifest_schema  # noqa: E402
from dfmspec.spec.experiment import Experiment  # noqa: E402

OWN_SECTIONS = ("cluster", "launcher", "run")
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}


def megatron_core() -> dict[str, Any]:
    """The catalogue of our own trainer, from the spec's models."""
    source = Experiment.model_json_schema()
    properties = {name: _flat(node, source["$defs"]) for name, node in source["properties"].items()}
    return _document("megatron_core-0.16.1", "An experiment for dfmspec's trainer on megatron-core 0.16.1.", properties)


def dfm(ours: dict[str, Any]) -> dict[str, Any]:
    """The catalogue of NVIDIA DFM at its pinned revision, from tools/dfm_fields.yaml, with our own sections."""
    table = yaml.safe_load((ROOT / "tools" / "dfm_fields.yaml").read_text())
    properties = {name: node for name, node in ours["properties"].items() if "properties" not in node or name in OWN_SECTIONS}
    for section, fields in table.items():
        properties[section] = {
            "type": "object", "additionalProperties": False, "description": f"DFM's {section} section.",
            "properties": {name: _dfm_field(*entry) for name, entry in fields.items()},
        }  # fmt: skip
    return _document("dfm-7cb7634", "An experiment for NVIDIA DFM 7cb7634 (Megatron-Bridge 953aabf7).", properties)


def _dfm_field(kind: str, default: Any, description: str) -> dict[str, Any]:
    null, kind = kind.endswith("?"), kind.rstrip("?")
    if "|" in kind:
        field: dict[str, Any] = {"enum": [*kind.split("|"), *([None] if null else [])]}
    else:
        field = {"type": [_TYPES[kind], "null"] if null else _TYPES[kind]}
    return {**field, "default": default, "description": description}


def _document(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    composition = {
        "extends": {"type": ["array", "string"], "items": {"type": "string"}, "description": "Specs whose keys lie under this one's, left to right."},
        "config_file": {"type": "string", "description": "An override file whose keys lie under this spec's own."},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#", "$id": f"https://dfmspec.dev/schemas/targets/{name}.schema.json",
        "title": name, "description": description, "type": "object", "additionalProperties": False,
        "properties": {**properties, **composition},
    }  # fmt: skip


def _flat(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Without $ref, and in the subset that draft-07 readers know."""
    if "$ref" in node:
        node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
    if "anyOf" in node:
        variants = [_flat(variant, definitions) for variant in node["anyOf"]]
        merged: dict[str, Any] = {}
        for variant in variants:
            merged |= {k: v for k, v in variant.items() if k not in ("type", "enum")}
        if any("enum" in variant for variant in variants):
            merged["enum"] = [value for variant in variants for value in variant.get("enum", [None])]
        else:
            merged["type"] = [variant["type"] for variant in variants]
        node = merged | {k: v for k, v in node.items() if k != "anyOf"}
    if "const" in node:
        node = {**{k: v for k, v in node.items() if k != "const"}, "enum": [node["const"]]}
    kept = {k: v for k, v in node.items() if k not in ("title", "default") or (k == "default" and "properties" not in node)}
    if "enum" in kept:
        kept.pop("type", None)
    if "properties" in kept:
        kept["properties"] = {name: _flat(child, definitions) for name, child in kept["properties"].items()}
    return kept


def experiment(targets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The schema of any spec, for editors: chosen by `target`."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://dfmspec.dev/schemas/experiment.schema.json",
        "title": "dfmspec experiment", "type": "object",
        "if": {"properties": {"target": {"const": "dfm"}}, "required": ["target"]},
        "then": {k: v for k, v in targets["dfm"].items() if not k.startswith("$")},
        "else": {k: v for k, v in targets["megatron_core"].items() if not k.startswith("$")},
    }  # fmt: skip


def generated() -> dict[Path, str]:
    """Every generated file and what it must hold."""
    ours = megatron_core()
    targets = {"megatron_core": ours, "dfm": dfm(ours)}
    files = {ROOT / SCHEMAS[name]: schema for name, schema in targets.items()}
    files[ROOT / "schemas" / "experiment.schema.json"] = experiment(targets)
    files[ROOT / "schemas" / "manifest.schema.json"] = manifest_schema()
    return {path: json.dumps(schema, indent=2) + "\n" for path, schema in files.items()}


def main() -> int:
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale; run: python tools/generate.py")
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(generated()[path])
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
