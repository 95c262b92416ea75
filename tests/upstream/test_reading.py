"""The model of upstream's reading gives what upstream resolved, and reads our compiled configuration as the plan means it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dfmspec.load import load_spec
from dfmspec.plan import config_text
from dfmspec.resolve import resolve_spec
from dfmspec.targets import target_module
from dfmspec.targets.dfm.upstream import Reading, Refused, read
from tests.conftest import ROOT
from tests.upstream.cases import HERE, cases

DEFAULTS = json.loads((HERE / "defaults.json").read_text())
NOWHERE = "<missing>"


def reading(case: dict) -> Reading:
    """The case, through argparse as the script has it."""
    text = case.get("yaml_text")
    if text is None and case.get("yaml") is not None:
        text = yaml.safe_dump(case["yaml"])
    path, mock, overrides, words = case.get("dataset_path", "/data/butterfly_webdataset"), bool(case.get("mock")), [], iter(case.get("cli", ()))
    for word in words:
        if not word.startswith("--"):
            overrides.append(word)
        elif "dataset-path".startswith(word[2:].partition("=")[0]):
            path = word.partition("=")[2] or next(words)
        elif "mock".startswith(word[2:]):
            mock = True
    return read(text, overrides, world_size=case["world_size"] or 1, mock=mock, dataset_path=path or "/opt/VFM/butterfly_webdataset", environment={})


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

    assert count == 1215 and wrong == []


def test_what_upstream_cannot_read_is_refused_by_the_model_too() -> None:
    unread = [case for case in cases() if case.get("stage") in ("cli_overrides", "yaml_load", "yaml_merge", "to_container") and not case.get("env")]
    accepted = []
    for case in unread:
        try:
            reading(case)
        except Refused:
            continue
        accepted.append(case["id"])

    assert len(unread) > 70
    assert set(accepted) <= {case["id"] for case in unread if any(word.startswith("-") for word in case.get("cli", ()))}  # argparse's own


VALID = [file for file in sorted((ROOT / "tests" / "corpus" / "valid").glob("*.yaml")) if load_spec(file).target != "megatron_core"]


@pytest.mark.parametrize("file", VALID, ids=lambda file: file.stem)
def test_the_compiled_configuration_is_read_as_the_plan_means_it(file: Path) -> None:
    resolved = resolve_spec(load_spec(file))
    made = target_module(resolved.spec.target).config(resolved.values)
    world = resolved["cluster.nnodes"] * resolved["cluster.nproc_per_node"]
    found = read(config_text(made), [], world_size=world, mock=resolved["data.source"] == "mock",
                 environment={"DFMSPEC_RUN_DIR": "/runs/x"}, target=resolved.spec.target)  # fmt: skip
    overlapped = {"overlap_grad_reduce", "overlap_param_gather", "bucket_size", "align_param_gather", "batch_p2p_comm", "overlap_p2p_comm", "wgrad_deferral_limit"}

    assert found.skipped == []
    for section, fields in made.items():
        for name, value in fields.items():
            if name == "_target_" or (name in overlapped and "comm_overlap" in made and section != "comm_overlap"):
                continue  # the overlap section decides, as it says
            got = found[f"{section}.{name}"]
            value = value.replace("${oc.env:DFMSPEC_RUN_DIR}", "/runs/x") if isinstance(value, str) else value  # noqa: PLW2901
            filled = value is None and got is not None  # null asks upstream to derive it
            assert got == value or filled, (section, name, value, got)
