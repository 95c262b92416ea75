"""The deep check: Megatron's own objects under a fake process group of the planned size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.targets import target_module
from tests.conftest import ROOT, dfmspec, environment

PLANNED = (
    "cluster: {nnodes: 128, nproc_per_node: 8}\ndata: {source: mock}\n"
    "model: {tensor_model_parallel_size: 4, pipeline_model_parallel_size: 4}\n"
)


def deep(*overrides: str) -> dict:
    """What the check says of a configuration that no rule has looked at."""
    resolved = resolve_spec(load_spec("spec.yaml", overrides, text=PLANNED + "train: {global_batch_size: 256}\n"))
    config = json.dumps(target_module("megatron_core").config(resolved.values))
    done = subprocess.run(
        [sys.executable, "-m", "dfmspec.trainer.commands.deep"],
        input=config,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"counted": target_module("megatron_core").parameters(resolved.values)}


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=dit_s"],
        [
            "recipe=dit_tiny",
            "model.tensor_model_parallel_size=2",
            "model.pipeline_model_parallel_size=2",
            "model.virtual_pipeline_model_parallel_size=2",
        ],
        [
            "recipe=dit_tiny",
            "model.pipeline_model_parallel_size=1",
            "model.sequence_parallel=true",
            "model.recompute_granularity=full",
            "model.recompute_method=uniform",
            "model.recompute_num_layers=1",
            "ddp.overlap_grad_reduce=true",
            "ddp.overlap_param_gather=true",
        ],
    ],
    ids=["pp4", "vpp", "recompute-overlap"],
)
def test_a_thousand_ranks_are_built_and_every_parameter_is_counted(overrides: list[str]) -> None:
    """The formula of dfmspec.estimate.size is exact: what Megatron's own modules hold, over all stages and ranks."""
    if overrides == ["recipe=dit_s"]:
        overrides = [*overrides, "model.tensor_model_parallel_size=2"]
    answer = deep(*overrides)

    assert answer["refusals"] == []
    assert answer["parameters"] == answer["counted"]


def test_what_megatron_refuses_is_told_in_its_words() -> None:
    answer = deep("recipe=dit_s", "model.tensor_model_parallel_size=4")

    assert answer["refusals"][0]["message"].startswith(
        "num_attention_heads (6) must be a multiple of tensor_model_parallel_size (4)"
    )
    assert answer["refusals"][0]["place"].startswith("megatron/core/transformer/transformer_config.py:")


def test_the_command_asks_megatron_only_what_the_rules_let_pass(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(PLANNED + "train: {global_batch_size: 256}\nrecipe: dit_tiny\n")
    good = dfmspec(
        "validate", file, "--check", "spec,deep", "model.pipeline_model_parallel_size=2", "--format", "concise"
    )
    bad = dfmspec("validate", file, "--check", "spec,deep", "model.tensor_model_parallel_size=3", "--format", "concise")

    assert good.returncode == 0, good.stdout + good.stderr
    assert "RUN201" not in good.stdout, good.stdout + good.stderr
    assert bad.returncode == 1
    assert "PAR101" in bad.stdout
    assert "RUN201" not in bad.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "specs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_specs_that_we_stand_behind_pass(file: Path) -> None:
    done = dfmspec("validate", "--check", "spec,deep", "--format", "concise", file)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "RUN201" not in done.stdout, done.stdout + done.stderr


def test_a_refusal_stands_at_the_key_that_megatron_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfmspec.check.rules import check_spec
    from dfmspec.cli import deep as command

    resolved = resolve_spec(load_spec(str(tmp_path / "spec.yaml"), text="model:\n  num_layers: 28\n"))
    refusal = {"stage": "pipeline stage 0 of 1", "message": "num_layers is wrong", "place": "megatron/core/x.py:1"}
    monkeypatch.setattr(
        command.subprocess,
        "run",
        lambda *args, **kwargs: subprocess.CompletedProcess(
            [], 0, json.dumps({"refusals": [refusal], "notes": []}), ""
        ),
    )
    (finding,) = command.deep_findings(resolved, check_spec(resolved, levels=("spec",)))

    assert (finding.code, finding.span.line) == ("RUN201", 2)
    assert "num_layers is wrong" in finding.message
