"""The catalogues of keys: readable by every JSON Schema tool, true to megatron-core, with nothing that nobody reads."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types as python_types
import typing
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.catalogue import types
from dfmspec.targets import TARGETS, catalogue, target_module
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "file",
    [
        ROOT / "schemas" / "experiment.schema.json",
        *(ROOT / file for file in (entry.schema for entry in TARGETS.values())),
    ],
    ids=lambda file: file.stem,
)
def test_a_schema_is_draft_7_and_uses_nothing_newer(file: Path) -> None:
    text = file.read_text()
    Draft7Validator.check_schema(json.loads(text))

    assert not re.search(r'"(prefixItems|unevaluatedProperties|\$defs|dependentRequired)"', text)


@pytest.mark.parametrize("target", TARGETS)
def test_every_field_says_what_it_is(target: str) -> None:
    for key, default in catalogue(target).defaults():
        field = catalogue(target).field(key)
        assert field is not None, key
        assert field.get("description"), key
        assert field.get("x-null") in ("kept", "derived", "default", "invalid"), key
        if "enum" in field:
            assert default is None or default in field["enum"], key
        assert key in ("extends", "config_file") or default is None or not Draft7Validator(field).is_valid(object()), (
            key
        )
        assert default is None or Draft7Validator(field).is_valid(default), key


@pytest.mark.parametrize("target", TARGETS)
def test_the_defaults_are_a_legal_spec_and_derivations_name_real_keys(target: str) -> None:
    known = {key for key, _ in catalogue(target).defaults()}
    for derivation in target_module(target).DERIVED:
        assert derivation.key in known, derivation.key
        assert {*derivation.sources} <= known, derivation.key
    for key, field in ((key, catalogue(target).field(key) or {}) for key in known):
        assert field.get("x-overwritten-by", key) in known, key
    resolved = resolve_spec(load_spec(None, [f"target={target}"]))
    assert not resolved.unknown
    assert not resolved.spec.problems


def _kinds(annotation: object) -> set[str]:
    """The JSON types of a Python annotation, as far as they are plain."""
    if typing.get_origin(annotation) in (typing.Union, python_types.UnionType):
        return {kind for inner in typing.get_args(annotation) for kind in _kinds(inner)}
    if typing.get_origin(annotation) is typing.Literal or (
        isinstance(annotation, type) and issubclass(annotation, enum.Enum)
    ):
        return {"string"}
    return {
        {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}.get(
            typing.cast("type", annotation), "other"
        )
    }


def test_fields_named_as_megatron_cores_have_its_types() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    compared = 0
    for section, cls in (
        ("model", TransformerConfig),
        ("optimizer", OptimizerConfig),
        ("ddp", DistributedDataParallelConfig),
    ):
        theirs = {
            field.name: hint
            for field in dataclasses.fields(cls)
            for name, hint in typing.get_type_hints(cls).items()
            if name == field.name
        }
        for name in catalogue("megatron_core").fields(section):
            if name in theirs:
                field = catalogue("megatron_core").field(f"{section}.{name}") or {}
                ours = {*types(field)} or {
                    "boolean" if isinstance(value, bool) else "null" if value is None else "string"
                    for value in field.get("enum", ())
                }
                assert ours - {"null"} <= _kinds(theirs[name]) | (
                    {"integer"} if "number" in _kinds(theirs[name]) else set()
                ), (section, name)
                compared += 1

    assert compared >= 30


def test_the_table_of_dfm_has_every_class_of_upstreams_container() -> None:
    sections = {name for name in catalogue("dfm").top_level if catalogue("dfm").is_section(name)}

    assert sections >= {
        "model",
        "train",
        "optimizer",
        "scheduler",
        "ddp",
        "dataset",
        "logger",
        "tokenizer",
        "checkpoint",
        "rng",
        "mixed_precision",
        "comm_overlap",
        "dist",
        "rerun_state_machine",
        "profiling",
        "ft",
        "straggler",
        "nvrx_straggler",
        "tensor_inspect",
        "inprocess_restart",
    }
    assert len(catalogue("dfm").fields("model")) > 250
