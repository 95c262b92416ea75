"""Each rule fires on its example and is silent on its near miss; the registry is sound."""

from __future__ import annotations

import itertools
import re

import pytest

from dfmspec.diagnostics import Severity
from dfmspec.load import load_spec
from dfmspec.resolve import resolve_spec
from dfmspec.rules import RULES, check_spec
from dfmspec.rules.base import Rule
from tests.conftest import ROOT

BASE = ["cluster.nproc_per_node=1"]


def codes(rule: Rule, overrides: tuple[str, ...], target: str) -> set[str]:
    words = [*BASE, f"target={target}", *(() if target == "dfm" else ("data.source=mock",)), *overrides]
    return {finding.code for finding in check_spec(resolve_spec(load_spec(None, words)))}


CASES = [pytest.param(rule, target, id=f"{rule.code}-{target}") for rule in RULES for target in rule.targets]


@pytest.mark.parametrize(("rule", "target"), CASES)
def test_a_rule_fires_on_its_example(rule: Rule, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example = tuple(word.replace("data.source=mock", "data.source=webdataset") for word in rule.example)
    if rule.code in ("DAT101", "RUN101"):  # what is missing is the fault
        words = [f"target={target}"]
        assert rule.code in {finding.code for finding in check_spec(resolve_spec(load_spec(None, words)))}
        return
    if any(word.startswith("dataset.path") for word in example) and target != "dfm":
        example = ("data.source=webdataset", *example)

    assert rule.code in codes(rule, example, target)


@pytest.mark.parametrize(("rule", "target"), CASES)
def test_a_rule_is_silent_on_its_near_miss(rule: Rule, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    near = tuple(word for word in rule.instead if not (target == "dfm" and word.startswith("data.")))
    if any(word.startswith("dataset.path") for word in near) and target != "dfm":
        near = ("data.source=webdataset", *near)
    if target == "dfm" and rule.code == "DAT101":
        near = ("dataset.path=/data/x",)

    assert rule.code not in codes(rule, near, target)


def test_the_registry_is_sound() -> None:
    assert len(RULES) >= 25
    assert len({rule.code for rule in RULES}) == len(RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert re.fullmatch(r"[A-Z]{3}\d{3}", rule.code), rule.code
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name), rule.name
        assert not re.match(r"(do-not|use|prefer)-", rule.name), rule.name
        assert rule.why.endswith("."), rule.code


def test_the_world_size_message_shows_the_arithmetic_and_what_works() -> None:
    words = ["cluster.nproc_per_node=16", "model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=3"]
    found = {finding.code: finding for finding in check_spec(resolve_spec(load_spec(None, words)))}

    assert "16 processes are not a multiple of TP 4 x PP 3 x CP 1 = 12" in found["PAR101"].message
    assert "TP 4 PP 2 CP 1" in found["PAR101"].hint and "TP 4 PP 1 CP 1" in found["PAR101"].hint


@pytest.mark.parametrize("override", ["model.seq_length=128", "ddp.use_distributed_optimizer=false", "dataset.global_batch_size=3"])
def test_a_copy_that_contradicts_its_source_is_an_error_even_alone(override: str) -> None:
    found = {finding.code: finding for finding in check_spec(resolve_spec(load_spec(None, [override])))}

    assert found["SPC301"].severity is Severity.ERROR


def test_a_rule_on_a_broken_value_is_skipped() -> None:
    found = {finding.code for finding in check_spec(resolve_spec(load_spec(None, ["model.num_attention_heads=none", "model.tensor_model_parallel_size=3"])))}

    assert "SPC202" in found and "PAR102" not in found and "MOD101" not in found


@pytest.mark.parametrize(("tp", "pp", "dp", "mbs"), list(itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 3), (1, 2))))
def test_every_legal_layout_is_silent_and_adds_up(tp: int, pp: int, dp: int, mbs: int) -> None:
    words = [
        f"cluster.nproc_per_node={tp * pp * dp}", f"model.tensor_model_parallel_size={tp}", f"model.pipeline_model_parallel_size={pp}",
        f"train.micro_batch_size={mbs}", f"train.global_batch_size={mbs * dp * 3}", "data.source=mock",
    ]  # fmt: skip
    resolved = resolve_spec(load_spec(None, words))

    assert [finding for finding in check_spec(resolved) if finding.severity is Severity.ERROR] == []
    assert resolved["train.global_batch_size"] % (mbs * dp) == 0
    assert resolved["data.num_streams"] % dp == 0
