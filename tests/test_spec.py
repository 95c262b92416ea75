"""The spec's models, their schemas, and that no key is there for nothing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.recipes import recipe_text
from dfmspec.targets import TARGETS, catalogue, recipes_of
from tests.conftest import ROOT

CODE = "\n".join(path.read_text() for folder in ("trainer", "targets", "run", "cli", "plan") for path in (ROOT / "dfmspec" / folder).rglob("*.py"))
CODE += (ROOT / "dfmspec" / "entry.py").read_text()
RULES = (ROOT / "dfmspec" / "check" / "rules" / "precision.py").read_text()
"""What a GPU can do is for rules to know."""
KEYS = [key for key, _ in catalogue("megatron_core").defaults() if "." in key]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_read_by_what_it_configures(key: str) -> None:
    section, _, name = key.partition(".")
    if section == "dataset" and name.endswith("_batch_size"):
        pytest.skip("a checked copy of the train section's, as upstream has it")

    assert re.search(rf"\.{name}\b|[\"']{name}[\"']", RULES if key == "cluster.gpu" else CODE)


def test_generated_files_are_up_to_date() -> None:
    result = subprocess.run([sys.executable, "tools/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stdout


def test_every_field_has_a_description_and_a_default() -> None:
    for name, node in catalogue("megatron_core").schema["properties"].items():
        for field, inner in node.get("properties", {}).items():
            assert inner.get("description"), (name, field)
            assert "default" in inner, (name, field)


@pytest.mark.parametrize(("target", "name"), [(target, name) for target in TARGETS for name in recipes_of(target)])
def test_a_recipe_is_legal_and_its_name_is_in_the_catalogue(target: str, name: str) -> None:
    resolved = resolve_spec(load_spec(None, [f"target={target}", f"recipe={name}"]))
    data = yaml.safe_load(recipe_text(name))

    assert not resolved.spec.problems and resolved["recipe"] == name
    given = {f"{section}.{key}": value for section, fields in data.items() for key, value in fields.items()}
    assert {key: resolved.values.get(key, value) for key, value in given.items()} == given  # a recipe may have keys that a target lacks
    if target == "megatron_core":
        Experiment.model_validate(data)


@pytest.mark.parametrize("network", ["wan", "flux"])
def test_the_recipes_are_upstreams_presets(network: str) -> None:
    presets = yaml.safe_load((ROOT / "tools" / f"dfm_{network}_fields.yaml").read_text())["presets"]

    for preset, name in zip(presets.values(), recipes_of(f"dfm_{network}"), strict=True):
        resolved = resolve_spec(load_spec(None, [f"target=dfm_{network}", f"recipe={name}"]))
        assert {key: resolved[f"model.{key}"] for key in preset["model"]} == preset["model"]
