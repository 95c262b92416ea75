"""The spec's models, their schemas, and that no key is there for nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import yaml

from dfmspec.plan.environment import environment as environment_of
from dfmspec.plan.plan import make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.run.bundle import programs
from dfmspec.run.request import Launch, Request
from dfmspec.run.sources import Sources
from dfmspec.spec.experiment import Experiment
from dfmspec.spec.launchers import LAUNCHERS
from dfmspec.spec.recipes import recipe_text
from dfmspec.targets import TARGETS, catalogue, recipes_of
from dfmspec.targets.layout import layout_of
from tests.conftest import ROOT, environment

ELSEWHERE = {
    # What nothing asks for on a CPU.
    "ddp.check_for_nan_in_grad",
    "model.cuda_graph_impl",
    # What has one legal value.
    "mixed_precision.fp8_recipe",
    # What the start by ssh asks for: tests/run/launch/test_ssh.py.
    "launcher.hosts",
    "launcher.ssh_options",
    # What the start of another's script asks for: tests/run/test_scripts.py.
    "launcher.root",
    "launcher.python",
    "launcher.torchrun_options",
    # What the entering of a container asks for: tests/run/test_containers.py.
    "launcher.container",
    "run.group",
    "launcher.container_engine",
    "launcher.container_mounts",
    "launcher.container_options",
    # What a GPU can do is for rules to know.
    "cluster.gpu",
    # Copies of the train section's that are checked, as upstream has them.
    "dataset.micro_batch_size",
    "dataset.global_batch_size",
    # What `dfmspec run` does after a training that succeeded: tests/run.
    "run.num_samples",
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The keys that something asks for: the trainer in a short training, a plan, its launchers and its supervisor."""
    folder = tmp_path_factory.mktemp("asked")
    command = [sys.executable, "-m", "tests.spec.reading", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads((folder / "asked.json").read_text())) | asked_by_plans()


class Recorded(dict[str, Any]):
    """Remembers the keys that were asked for."""

    def __init__(self, values: Mapping[str, Any], prefix: str, into: set[str]) -> None:
        super().__init__(values)
        self.prefix = prefix
        self.into = into

    def __getitem__(self, key: str) -> Any:
        self.into.add(self.prefix + key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.into.add(self.prefix + key)
        return super().get(key, default)


def asked_by_plans() -> set[str]:
    """What a plan, its launchers and its supervisor ask for."""
    found: set[str] = set()
    for kind in LAUNCHERS:
        words = [
            f"launcher.kind={kind}",
            "cluster.nnodes=2",
            "data.source=mock",
            "launcher.image=image",
            "launcher.hosts=[a, b]",
        ]
        resolved = resolve_spec(load_spec(None, words))
        environment_of(Recorded(resolved.values, "", found))
        layout_of(Recorded(resolved.values, "", found))
        made = make_plan(resolved)
        launcher = Recorded(made.launcher, "launcher.", found)
        made = dataclasses.replace(made, launcher=launcher, run=Recorded(made.run, "run.", found))
        programs(made)
        made.words(None)
        request = Request(made, None, None, (), print)
        Launch.of(request)
        Sources.of(request)
    return found


@pytest.mark.parametrize("key", [key for key, _ in catalogue("megatron_core").defaults() if "." in key])
def test_every_key_is_asked_for(key: str, asked: set[str]) -> None:
    assert key in asked or key in ELSEWHERE


def test_generated_files_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, "tools/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )

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

    assert not resolved.spec.problems
    assert resolved["recipe"] == name
    given = {f"{section}.{key}": value for section, fields in data.items() for key, value in fields.items()}
    assert {
        key: resolved.values.get(key, value) for key, value in given.items()
    } == given  # a recipe may have keys that a target lacks
    if target == "megatron_core":
        Experiment.model_validate(data)


@pytest.mark.parametrize("network", ["wan", "flux"])
def test_the_recipes_are_upstreams_presets(network: str) -> None:
    presets = yaml.safe_load((ROOT / "tools" / f"dfm_{network}_fields.yaml").read_text())["presets"]

    for preset, name in zip(presets.values(), recipes_of(f"dfm_{network}"), strict=True):
        resolved = resolve_spec(load_spec(None, [f"target=dfm_{network}", f"recipe={name}"]))
        assert {key: resolved[f"model.{key}"] for key in preset["model"]} == preset["model"]
