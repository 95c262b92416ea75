"""The model of upstream's reading gives what upstream resolved.

It reads our compiled configuration as the plan means it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dfmspec.check.rules import check_spec
from dfmspec.diagnostics import Severity
from dfmspec.plan.plan import config_text, make_plan
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec
from dfmspec.targets import target_module
from dfmspec.targets.dfm.upstream import Reading, Refused, read
from tests.conftest import ROOT
from tests.targets.dfm.cases import HERE, cases, compiled

DEFAULTS = json.loads((HERE / "defaults.json").read_text())
NOWHERE = "<missing>"


def reading(case: dict) -> Reading:
    """The case, through argparse as the script has it."""
    text = case.get("yaml_text")
    if text is None and case.get("yaml") is not None:
        text = yaml.safe_dump(case["yaml"])
    path, mock, overrides, words = (
        case.get("dataset_path", "/data/butterfly_webdataset"),
        bool(case.get("mock")),
        [],
        iter(case.get("cli", ())),
    )
    for word in words:
        if not word.startswith("--"):
            overrides.append(word)
        elif "dataset-path".startswith(word[2:].partition("=")[0]):
            path = word.partition("=")[2] or next(words)
        elif "mock".startswith(word[2:]):
            mock = True
    return read(
        text,
        overrides,
        world_size=case["world_size"] or 1,
        mock=mock,
        dataset_path=path or "/opt/VFM/butterfly_webdataset",
        environment={},
    )


def test_every_accepted_case_resolves_to_what_was_recorded() -> None:
    """1,215 cases, each with every field that was recorded, and the keys that upstream dropped."""
    wrong, count = [], 0
    for case in cases():
        if case["verdict"] != "accept":
            continue
        count += 1
        found = reading(case)
        for key, expected in {**DEFAULTS, **case["resolved_changed"]}.items():
            got = found.data_parallel_size if key == "data_parallel_size" else found[key]
            text = str(expected).removeprefix("AttnBackend.")
            if expected not in (NOWHERE, got) and str(got) != text:
                wrong.append((case["id"], key, got, expected))
        if sorted(found.skipped) != sorted(case.get("skipped_keys") or []):
            wrong.append((case["id"], "skipped", found.skipped, case.get("skipped_keys")))

    assert count == 1215
    assert wrong == []


def test_what_upstream_cannot_read_is_refused_by_the_model_too() -> None:
    unread = [
        case
        for case in cases()
        if case.get("stage") in ("cli_overrides", "yaml_load", "yaml_merge", "to_container") and not case.get("env")
    ]
    accepted = []
    for case in unread:
        try:
            reading(case)
        except Refused:
            continue
        accepted.append(case["id"])

    assert len(unread) > 70
    assert set(accepted) <= {
        case["id"] for case in unread if any(word.startswith("-") for word in case.get("cli", ()))
    }  # argparse's own


VALID = [
    file
    for file in sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml"))
    if load_spec(file).target != "megatron_core"
]


def kept(resolved: Resolved) -> None:
    """The compiled configuration, read by the model, is what the plan says; null asks upstream to derive a value."""
    made = target_module(resolved.spec.target).config(resolved.values)
    world = resolved["cluster.nnodes"] * resolved["cluster.nproc_per_node"]
    found = read(
        config_text(made),
        [],
        world_size=world,
        mock=resolved["data.source"] == "mock",
        environment={"DFMSPEC_RUN_DIR": "/runs/x"},
        target=resolved.spec.target,
    )

    assert found.skipped == []
    for section, fields in made.items():
        for name, value in fields.items():
            got = found[f"{section}.{name}"]
            value = value.replace("${oc.env:DFMSPEC_RUN_DIR}", "/runs/x") if isinstance(value, str) else value  # noqa: PLW2901
            assert name == "_target_" or value in (None, got), (section, name, value, got)


@pytest.mark.parametrize("file", VALID, ids=lambda file: file.stem)
def test_the_compiled_configuration_is_read_as_the_plan_means_it(file: Path) -> None:
    kept(resolve_spec(load_spec(file)))


@pytest.mark.parametrize(("target", "enough"), [("dfm", 450), ("dfm_wan", 30), ("dfm_flux", 30)])
def test_every_recorded_case_that_we_accept_compiles_to_what_upstream_keeps(target: str, enough: int) -> None:
    accepted = 0
    for case in cases():
        resolved = compiled(case, target)
        if not any(finding.severity is Severity.ERROR for finding in check_spec(resolved, levels=("spec",))):
            accepted += 1
            kept(resolved)
            make_plan(resolved)  # which reads it back too

    assert accepted >= enough


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["comm_overlap.tp_comm_overlap=false"],
            {
                "ddp.overlap_grad_reduce": True,
                "ddp.overlap_param_gather": True,
                "ddp.bucket_size": 2**27,
                "optimizer.overlap_param_gather": True,
                "model.batch_p2p_comm": False,
            },
        ),
        (
            ["comm_overlap.tp_comm_overlap=false", "comm_overlap.bucket_size=5"],
            {"ddp.bucket_size": 5, "model.wgrad_deferral_limit": -1},
        ),
        (
            ["dist.use_megatron_fsdp=true", "checkpoint.ckpt_format=fsdp_dtensor"],
            {"ddp.use_megatron_fsdp": True, "ddp.average_in_collective": False},
        ),
        (["model.use_te_rng_tracker=true"], {"rng.te_rng_tracker": True}),
        (
            ["model.gradient_accumulation_fusion=true"],
            {
                "model.gradient_accumulation_fusion": True,
                "ddp.preserve_fp32_weights": True,
                "ddp.overlap_grad_reduce": False,
            },
        ),
    ],
)
def test_twins_that_upstream_overwrites_are_derived(words: list[str], expected: dict) -> None:
    resolved = resolve_spec(load_spec(None, ["target=dfm", "cluster.nproc_per_node=8", "data.source=mock", *words]))

    assert {key: resolved[key] for key in expected} == expected
    kept(resolved)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (
            [
                "ddp.use_megatron_fsdp=true",
                "checkpoint.ckpt_format=fsdp_dtensor",
                "model.gradient_accumulation_fusion=true",
            ],
            "SPC301",
        ),
        (
            ["ddp.use_megatron_fsdp=false", "dist.use_megatron_fsdp=true", "checkpoint.ckpt_format=fsdp_dtensor"],
            "SPC301",
        ),
        (["rng.te_rng_tracker=true", "model.use_te_rng_tracker=false"], "SPC301"),
        (["comm_overlap.tp_comm_overlap=false", "ddp.overlap_param_gather=false"], "SPC306"),
    ],
)
def test_a_twin_that_upstream_would_not_keep_is_an_error(words: list[str], code: str) -> None:
    findings = check_spec(
        resolve_spec(load_spec(None, ["target=dfm", "cluster.nproc_per_node=8", "data.source=mock", *words])),
        levels=("spec",),
    )

    assert [finding.code for finding in findings if finding.severity is Severity.ERROR] == [code]
