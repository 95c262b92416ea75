"""The JSON Schemas that tools/generate.py writes: a catalogue of keys for each target, and the schema of any spec.

The keys of dfmspec's own trainer come from the spec's models, those of NVIDIA DFM from tools/dfm*_fields.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from dfmspec import __version__
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.launchers import LAUNCHERS
from dfmspec.spec.presets import PRESETS
from dfmspec.spec.units import SUFFIXES, UNITS, pattern_of, unit_of
from dfmspec.targets import TARGETS, recipes_of, target_module
from dfmspec.targets.dfm.bridge import CLASSES

HERE = Path(__file__).parent
DRAFT = "http://json-schema.org/draft-07/schema#"
REVISION = "7cb7634"
NETWORKS = {"dfm": "DiT", "dfm_wan": "WAN", "dfm_flux": "FLUX"}
"""NVIDIA DFM's targets, and what each trains."""

Node = dict[str, Any]
"""A JSON Schema, or a part of one."""


def without(node: Node, *names: str) -> Node:
    """A node but some of its words."""
    return {key: value for key, value in node.items() if key not in names}


# Any target.


def _one_of(names: Iterable[str], node: Node) -> Node:
    """A text that is one of the names of a table."""
    return {**without(node, "type"), "enum": list(names)}


def _with_derivations(properties: Node, target: str) -> Node:
    """With the formula of each derived value, as its target computes it, what a null does to each key, and its unit."""
    for derivation in target_module(target).DERIVED:
        section, field = derivation.key.split(".")
        fields = properties.get(section, {}).get("properties", {})
        if field in fields:
            fields[field]["x-derived"] = derivation.formula
    for section, node in properties.items():
        for name, field in node.get("properties", {"": node}).items():
            field["x-null"] = _null(field)
            unit = UNITS.get(f"{section}.{name}")
            if unit is not None:
                field["x-unit"] = unit
    return properties


def _null(field: Node) -> str:
    """What a null of the spec's does: it is kept, stands for the derived value or for the default, or is invalid."""
    declared = field.get("type", ())
    takes_null = "null" in declared or None in field.get("enum", ())
    if not takes_null:
        return "invalid"
    if "x-null" in field:
        return str(field["x-null"])
    if "x-derived" in field:
        return "derived"
    # What stands there is lost, whatever it is.
    return "default" if "x-overwritten-by" in field else "kept"


def with_names(target: str, schema: Node) -> Node:
    """A catalogue that is kept by hand, with the names of the tables and the formulas of its derived values."""
    properties = dict(schema["properties"])
    properties["recipe"] = _one_of(recipes_of(target), properties["recipe"])
    properties["target"] = _one_of(TARGETS, properties["target"])
    launcher = properties["launcher"]["properties"]
    kinds = {**launcher, "kind": _one_of(LAUNCHERS, launcher["kind"])}
    properties["launcher"] = {**properties["launcher"], "properties": kinds}
    return {**schema, "properties": _with_derivations(properties, target)}


def _document(name: str, description: str, properties: Node) -> Node:
    composition = {
        "profile": {
            "type": ["array", "string", "null"],
            "items": {"type": "string"},
            "description": (
                "Profiles of the site, the user and the project that lie under this spec: a name, several with commas "
                "or as a list; --profile takes their place."
            ),
            "x-null": "default",
        },
        "extends": {
            "type": ["array", "string"],
            "items": {"type": "string"},
            "description": "Specs whose keys lie under this one's, left to right.",
            "x-null": "invalid",
        },
        "config_file": {
            "type": "string",
            "description": "An override file whose keys lie under this spec's own.",
            "x-null": "invalid",
        },
        "matrix": {
            "type": "object",
            "description": (
                "Keys, each with a list of values: one run for each combination, less `exclude`, and each of `include`."
            ),
            "x-null": "invalid",
        },
    }
    return {
        "$schema": DRAFT,
        "$id": f"https://dfmspec.dev/schemas/{__version__}/targets/{name}.schema.json",
        "title": name,
        "description": description,
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, **composition},
    }


# dfmspec's own trainer.


def megatron_core() -> Node:
    """The catalogue of our own trainer, from the spec's models."""
    source = Experiment.model_json_schema()
    properties = {name: _flat(node, source["$defs"]) for name, node in source["properties"].items()}

    # What is one of a table's names is text in the models.
    properties["recipe"] = _one_of(recipes_of("megatron_core"), properties["recipe"])
    properties["target"] = _one_of(TARGETS, properties["target"])
    launcher = properties["launcher"]["properties"]
    launcher["kind"] = _one_of(LAUNCHERS, launcher["kind"])
    launcher["env_presets"]["items"] = {"enum": list(PRESETS)}
    return _document(
        "megatron_core-0.16.1",
        "An experiment for dfmspec's trainer on megatron-core 0.16.1.",
        _with_derivations(properties, "megatron_core"),
    )


def _flat(node: Node, definitions: Node) -> Node:
    """Without $ref, and in the subset that draft-07 readers know."""
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        node = {**definitions[name], **without(node, "$ref")}
    if node.get("x-derived") is True:
        node = _or_null(node)
    if "anyOf" in node:
        variants = [_flat(variant, definitions) for variant in node["anyOf"]]
        node = _merged(variants) | without(node, "anyOf")
    if "const" in node:
        node = {**without(node, "const"), "enum": [node["const"]]}

    # The entries of a mapping.
    if isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"] = without(_flat(node["additionalProperties"], definitions), "description")

    # A section has no default of its own; its fields have.
    node = without(node, "title")
    if "properties" in node:
        node = without(node, "default")
        node["properties"] = {name: _flat(child, definitions) for name, child in node["properties"].items()}
    if "enum" in node:
        node = without(node, "type")
    return node


def _or_null(node: Node) -> Node:
    """A derived field: as written it may be null, as resolved it never is."""
    words = {name: node[name] for name in ("default", "description", "title") if name in node}
    value = without(node, *words, "x-derived")
    return {"anyOf": [value, {"type": "null"}], **words}


def _merged(variants: list[Node]) -> Node:
    """Variants of a value as one node, with all their types or all their choices."""
    merged: Node = {}
    for variant in variants:
        merged |= without(variant, "type", "enum")
    if not any("enum" in variant for variant in variants):
        merged["type"] = [variant["type"] for variant in variants]
        return merged
    merged["enum"] = []
    for variant in variants:
        # A variant without choices is null.
        merged["enum"] += variant.get("enum", [None])
    return merged


# NVIDIA DFM.

OWN_SECTIONS = ("cluster", "launcher", "run")
"""Sections that dfmspec alone reads, whatever trains."""
DTYPES = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.half", "torch.uint8")
_TYPES = {
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "str": "string",
    "list": "array",
    "map": "object",
}
_MARKS = {
    "upstream": "x-upstream",
    "no_effect": "x-no-effect",
    "overwritten_by": "x-overwritten-by",
    "mock_only": "x-mock-only",
    "energon_only": "x-energon-only",
    "null_is": "x-null",
    "null_upstream": "x-null-upstream",
}
"""Facts of a field that rules and plans read, by their names in the table."""
_SEEN_WITH_DIT = "null_upstream"
"""The fact that was seen with DiT's script alone."""


def dfm(target: str, ours: Node) -> Node:
    """The catalogue of NVIDIA DFM for one of its networks, from tools/dfm*_fields.yaml, with our own sections."""
    # Ours.
    properties = {}
    for name, node in ours["properties"].items():
        if "properties" not in node or name in OWN_SECTIONS:
            properties[name] = dict(node)
    properties["recipe"] |= {
        "enum": list(recipes_of(target)),
        "default": TARGETS[target].default_recipe,
    }
    properties["data"] = _dfm_data(ours["properties"]["data"])

    # Upstream's.
    for section, fields in _table(target).items():
        properties[section] = _dfm_section(section, fields)
    name = Path(TARGETS[target].schema).name.removesuffix(".schema.json")
    title = f"An experiment for NVIDIA DFM {REVISION} (Megatron-Bridge 953aabf7), {NETWORKS[target]}."
    return _document(name, title, _with_derivations(properties, target))


def _table(target: str) -> dict[str, dict[str, Node]]:
    """section -> field -> facts: DiT's, or another network's own over it."""
    table: dict[str, dict[str, Node]] = yaml.safe_load((HERE / "dfm_fields.yaml").read_text())
    if target == "dfm":
        return table
    own = yaml.safe_load((HERE / f"{target}_fields.yaml").read_text())

    for fields in table.values():
        for name, field in fields.items():
            fields[name] = without(field, _SEEN_WITH_DIT)

    # Whole sections: what is the same as DiT's, and what is new.
    for section, same in own["same_as_dit"].items():
        table[section] = {name: table[section][name] for name in same} | own[section]

    # Other values in the recipe; null: derived here.
    for key, value in own["recipe"].items():
        section, name = key.split(".")
        field = table[section][name]
        if value is None:
            table[section][name] = {**field, "upstream": field["default"], "default": None}
        elif field["default"] is None:
            table[section][name] = {**field, "upstream": value}
        else:
            table[section][name] = {**field, "default": value}
    return table


def _dfm_data(node: Node) -> Node:
    """`data` for DFM: a WebDataset, or its own random tensors (--mock)."""
    source = {
        **node["properties"]["source"],
        "enum": ["webdataset", "mock"],
        "description": "webdataset: dataset.path. mock: DFM's random tensors (--mock).",
    }
    return {**node, "properties": {"source": source}}


def _dfm_section(section: str, fields: dict[str, Node]) -> Node:
    has_class = "_target_" in fields
    is_named = "recipe" in fields
    # The recipe leaves some sections out, and a name may stand for a precision.
    is_optional = has_class or is_named or section == "profiling"
    types = ["object"]
    if is_named:
        types.append("string")
    if is_optional:
        types.append("null")
    properties = {name: _dfm_field(entry) for name, entry in fields.items()}
    if has_class:
        # Upstream would import and call whatever stands there.
        properties["_target_"] = _dfm_field({**fields["_target_"], "values": [CLASSES[section]]})
    return {
        "type": types if is_optional else "object",
        "additionalProperties": False,
        "description": f"DFM's {section} section.",
        "properties": properties,
    }


def _dfm_field(entry: Node) -> Node:
    """A field of the table as a schema: its type or its choices, its default, its meaning, its marks."""
    marks = {mark: entry[name] for name, mark in _MARKS.items() if name in entry}
    kind = entry["type"].rstrip("?")
    takes_null = entry["type"].endswith("?")
    if kind == "callable":
        legal = [None] if takes_null else []
        return {"enum": legal, "default": None, "description": entry["meaning"], "x-callable": True, **marks}

    choices = DTYPES if kind == "dtype" else entry.get("values")
    if choices:
        field = {"enum": [*choices]}
        if takes_null:
            field["enum"].append(None)
    else:
        field = _typed(kind, takes_null) | _limits(entry)
    return {**field, "default": entry["default"], "description": entry["meaning"], **marks}


def _typed(kind: str, takes_null: bool) -> Node:
    names = [_TYPES[name] for name in kind.split("|")]
    if takes_null:
        names.append("null")
    if len(names) == 1:
        return {"type": names[0]}
    return {"type": names}


def _limits(entry: Node) -> Node:
    limits = {}
    if "minimum" in entry:
        word = "exclusiveMinimum" if entry.get("exclusive") else "minimum"
        limits[word] = entry["minimum"]
    if "maximum" in entry:
        limits["maximum"] = entry["maximum"]
    return limits


# A spec of any target.


def experiment(targets: dict[str, Node]) -> Node:
    """The schema of any spec, for editors: chosen by `target`, with all the ways in which a value may be written."""
    return {
        "$schema": DRAFT,
        "$id": f"https://dfmspec.dev/schemas/{__version__}/experiment.schema.json",
        "title": "dfmspec experiment",
        "type": "object",
        "definitions": {
            _REFERENCE: {"type": "string", "pattern": r"\$\{(env:[A-Za-z_][A-Za-z0-9_]*(:-[^}]*)?|spec\.[\w.-]+)\}"},
            **{unit.replace(" ", "_"): {"type": "string", "pattern": pattern_of(unit)} for unit in SUFFIXES},
        },
        **_chosen(targets),
    }


_REFERENCE = "reference"


def _chosen(targets: dict[str, Node]) -> Node:
    """An if-then-else over the targets; the first is what a spec that names none is for."""
    bodies = [(name, _as_written(name, without(schema, "$schema", "$id"))) for name, schema in targets.items()]
    (_, node), *others = bodies
    for name, body in reversed(others):
        condition = {"properties": {"target": {"enum": [name, _pinned(name)]}}, "required": ["target"]}
        node = {"if": condition, "then": body, "else": node}
    return node


def _as_written(target: str, schema: Node) -> Node:
    """A catalogue of values as a schema of what a spec may write for them."""
    properties = {}
    for name, node in schema["properties"].items():
        if "properties" in node:
            fields = {field: _field_as_written(inner) for field, inner in node["properties"].items()}
            properties[name] = {**node, "properties": fields}
        else:
            properties[name] = node
    choices = properties["target"]["enum"]
    properties["target"] = {**properties["target"], "enum": [*choices, *map(_pinned, choices)]}
    properties["name"] = _field_as_written(properties["name"])
    return {**schema, "properties": properties}


def _pinned(target: str) -> str:
    return f"{target}@{TARGETS[target].revision}"


def _field_as_written(field: Node) -> Node:
    """A field whose value may be a reference, or a number with a unit."""
    words = {name: field[name] for name in ("description", "default") if name in field}
    value = without(field, *words)
    declared = value.get("type", ())
    ways = [_REFERENCE]
    if "x-unit" in value or ({"integer", "number"} & {*([declared] if isinstance(declared, str) else declared)}):
        ways.append(unit_of(value).replace(" ", "_"))
    # What takes any text takes these too.
    takes_any = "string" in declared and not {"pattern", "enum"} & value.keys()
    if takes_any or "x-callable" in value:
        return field
    return {**words, "anyOf": [value, *({"$ref": f"#/definitions/{way}"} for way in ways)]}
