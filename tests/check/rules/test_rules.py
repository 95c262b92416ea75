"""Each rule fires on its example and is silent on its near miss (tests/corpus/rules/<code>); the registry is sound."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from dfmspec.check.rules import LEVELS, RULES, check_spec
from dfmspec.check.rules.base import DIT, Rule
from dfmspec.diagnostics import Severity
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.targets import TARGETS, recipes_of
from tests.conftest import ROOT

CORPUS = ROOT / "tests" / "corpus" / "rules"


def codes(file: Path, target: str) -> set[str]:
    """The codes of a corpus file; one that names its target is checked for that one alone.

    A .txt beside it: overrides, a line each.
    """
    text = file.read_text()
    words = [] if re.search(r"^target:", text, re.MULTILINE) else [f"target={target}"]
    overrides = file.with_suffix(".txt")
    words += overrides.read_text().splitlines() if overrides.exists() else []
    return {finding.code for finding in check_spec(resolve_spec(load_spec(file, words)), levels=LEVELS)}


WITH_EXAMPLES = [rule for rule in RULES if rule.level not in ("deep", "policy", "fault")]
CASES = [
    pytest.param(rule, target, id=f"{rule.code}-{target}")
    for rule in WITH_EXAMPLES
    for target in (DIT if {*rule.targets} & {*DIT} else rule.targets[:1])
    if target in rule.targets
]
_NOT_ALIKE = {"EVL101", "EVL106", "RUN109", "CKP123", ("BAT102", "dfm_flux"), ("BAT106", "dfm_flux")}
"""Examples with evaluation, packing or an end that the other networks do not have."""
SHARED = [
    pytest.param(rule, target, id=f"{rule.code}-{target}")
    for rule in WITH_EXAMPLES
    for target in ("dfm_wan", "dfm_flux")
    if {"dfm", target} <= {*rule.targets} and not {rule.code, (rule.code, target)} & _NOT_ALIKE
]


@pytest.mark.parametrize(("rule", "target"), CASES)
def test_a_rule_fires_on_its_example_and_is_silent_on_its_near_miss(rule: Rule, target: str) -> None:
    assert rule.code in codes(CORPUS / rule.code / "bad.yaml", target)
    assert rule.code not in codes(CORPUS / rule.code / "good.yaml", target)


@pytest.mark.parametrize(("rule", "target"), SHARED)
def test_a_shared_rule_fires_for_the_other_networks_too(rule: Rule, target: str) -> None:
    file = CORPUS / rule.code / "bad.yaml"
    overrides = file.with_suffix(".txt")
    words = [
        f"target={target}",
        f"recipe={TARGETS[target].default_recipe}",
        *(overrides.read_text().splitlines() if overrides.exists() else []),
    ]

    assert rule.code in {finding.code for finding in check_spec(resolve_spec(load_spec(file, words)), levels=LEVELS)}


@pytest.mark.parametrize("source", ["data.source=mock", "dataset.path=/data"])
@pytest.mark.parametrize("recipe", [*recipes_of("dfm_wan"), *recipes_of("dfm_flux")])
def test_the_other_networks_recipes_are_sound(recipe: str, source: str) -> None:
    words = [
        f"target=dfm_{recipe.partition('_')[0]}",
        f"recipe={recipe}",
        source,
        "cluster.nproc_per_node=8",
        "train.train_iters=500",
    ]

    assert [
        finding
        for finding in check_spec(resolve_spec(load_spec(None, words)), levels=("spec",))
        if finding.severity > Severity.HINT
    ] == []


def test_every_folder_of_the_corpus_belongs_to_a_rule() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == {rule.code for rule in WITH_EXAMPLES}


def test_the_registry_is_sound() -> None:
    assert len({rule.code for rule in RULES}) == len(RULES)
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert re.fullmatch(r"[A-Z]{3}\d{3}", rule.code), rule.code
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name), rule.name
        assert not re.match(r"(do-not|use|prefer)-", rule.name), rule.name
        assert rule.why.endswith("."), rule.code
        assert rule.source, rule.code


def found(*words: str) -> dict[str, tuple[str, str]]:
    return {
        finding.code: (finding.message, finding.hint) for finding in check_spec(resolve_spec(load_spec(None, words)))
    }


def test_the_world_size_message_shows_the_arithmetic_and_what_works() -> None:
    message, hint = found(
        "cluster.nproc_per_node=16", "model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=3"
    )["PAR101"]

    assert "16 processes are not a multiple of TP 4 x PP 3 x CP 1 = 12" in message
    assert "TP 4 PP 2 CP 1" in hint
    assert "TP 4 PP 1 CP 1" in hint


@pytest.mark.parametrize(
    "override", ["model.seq_length=128", "ddp.use_distributed_optimizer=false", "dataset.global_batch_size=3"]
)
def test_a_copy_that_contradicts_its_source_is_an_error_even_alone(override: str) -> None:
    findings = {finding.code: finding for finding in check_spec(resolve_spec(load_spec(None, [override])))}

    assert findings["SPC301"].severity is Severity.ERROR


def test_the_layouts_that_a_hint_offers_are_legal() -> None:
    words = [
        "cluster.nproc_per_node=8",
        "model.tensor_model_parallel_size=3",
        "model.context_parallel_size=4",
        "model.num_attention_heads=24",
        "model.sequence_parallel=true",
    ]
    _, hint = found(*words)["PAR101"]
    offered = re.findall(r"TP (\d+) PP (\d+) CP (\d+)", hint)

    assert ("2", "1", "4") in offered
    for sizes in offered:
        keys = ("tensor_model", "pipeline_model", "context")
        assert not found(
            *words, *(f"model.{key}_parallel_size={size}" for key, size in zip(keys, sizes, strict=True))
        ).keys() & {"PAR101", "PAR102", "PAR103", "SEQ101"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["model.num_layers=3", "model.recompute_num_layers=2"], "MOD103"),
        (
            [
                "model.num_layers=6",
                "model.recompute_num_layers=2",
                "cluster.nproc_per_node=2",
                "model.pipeline_model_parallel_size=2",
            ],
            "MOD103",
        ),
        (["model.num_layers=6", "model.recompute_num_layers=3"], None),
    ],
)
def test_uniform_recomputation_ends_with_the_last_layer(words: list[str], code: str | None) -> None:
    both = found(*words, "model.recompute_granularity=full", "model.recompute_method=uniform", "data.source=mock")

    assert ("MOD103" in both) == (code is not None)


def test_a_ramp_of_the_weight_decay_is_no_stale_copy() -> None:
    for weight_decay in ([], ["optimizer.weight_decay=0.2"]):
        assert "SPC301" not in found(
            "scheduler.start_weight_decay=0.0", "scheduler.end_weight_decay=0.1", *weight_decay
        )
    assert "SPC301" in found(
        "scheduler.start_weight_decay=0.1", "scheduler.end_weight_decay=0.1", "optimizer.weight_decay=0.2"
    )


@pytest.mark.parametrize("word", ["model.in_channels=8", "model.patch_temporal=2", "model.crossattn_emb_size=48"])
def test_the_embedded_data_has_shapes_of_its_own(word: str) -> None:
    assert word.partition("=")[0] in found("data.source=embedded", word)["MOD104"][0]
    assert "MOD104" not in found("data.source=mock", word)


def test_two_packs_may_be_cut_where_one_may_not() -> None:
    words = [
        "cluster.nproc_per_node=2",
        "model.context_parallel_size=2",
        "dataset.task_encoder_seq_length=1025",
        "data.source=mock",
    ]

    assert "SEQ101" in found(*words)
    assert "SEQ101" not in found(*words, "train.micro_batch_size=2")


def test_a_folder_to_go_on_from_has_something_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005").mkdir()
    (tmp_path / "iter_0000005" / "manifest.json").touch()
    load = f"checkpoint.load={tmp_path}"

    assert f"name {tmp_path}, and checkpoint.ckpt_step 5" in found(f"{load}/iter_0000005")["CKP104"][1]
    assert "nothing would be trained" in found(load, "train.train_iters=5")["CKP104"][0]
    assert "CKP104" not in found(load, "train.train_iters=6")


def test_a_save_that_was_not_finished_is_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    load = f"checkpoint.load={tmp_path}"
    unfinished = tmp_path / "iter_0000009"
    unfinished.mkdir()
    (unfinished / ".metadata").touch()
    alone = found(load, "train.train_iters=8")["CKP104"]
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "manifest.json").touch()

    assert "iter_0000009 has no manifest.json" in alone[0]
    assert "CKP104" not in found(load, "train.train_iters=8")
    assert "after iteration 2, but train.train_iters is 2" in found(load, "train.train_iters=2")["CKP104"][0]
    assert "no whole checkpoint of iteration 9" in found(load, "checkpoint.ckpt_step=9")["CKP104"][0]
    assert "no checkpoint of iteration 7" in found(load, "checkpoint.ckpt_step=7")["CKP104"][0]


@pytest.mark.parametrize("key", ["checkpoint.load", "checkpoint.save", "run.resume"])
@pytest.mark.parametrize("target", ["megatron_core", "dfm", "dfm_wan", "dfm_flux"])
def test_checkpoints_of_another_program_are_told_as_such(target: str, key: str, tmp_path: Path) -> None:
    is_own = target == "megatron_core"
    mark = "run_config.yaml" if is_own else "manifest.json"
    whose = "Megatron-Bridge's" if is_own else "dfmspec's"
    (tmp_path / "iter_0000009").mkdir()
    (tmp_path / "iter_0000009" / mark).touch()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    told = found(f"target={target}", f"{key}={tmp_path}", "data.source=mock")

    assert f"is {whose} (it has {mark})" in told["CKP122"][0]
    assert "CKP104" not in told


def test_one_whole_checkpoint_beside_those_of_another_program_is_enough(tmp_path: Path) -> None:
    for iteration, mark in (("0000002", "manifest.json"), ("0000009", "run_config.yaml")):
        (tmp_path / f"iter_{iteration}").mkdir()
        (tmp_path / f"iter_{iteration}" / mark).touch()

    assert "CKP122" not in found(f"checkpoint.load={tmp_path}")
    assert "CKP122" in found(f"checkpoint.load={tmp_path}", "checkpoint.ckpt_step=9")


def test_a_rule_on_a_broken_value_is_skipped() -> None:
    codes = found("model.num_attention_heads=none", "model.tensor_model_parallel_size=3").keys()

    assert "SPC202" in codes
    assert "PAR102" not in codes
    assert "MOD101" not in codes


@pytest.mark.parametrize(("tp", "pp", "dp", "mbs"), list(itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 3), (1, 2))))
def test_every_legal_layout_is_silent_and_adds_up(tp: int, pp: int, dp: int, mbs: int) -> None:
    words = [
        f"cluster.nproc_per_node={tp * pp * dp}",
        f"model.tensor_model_parallel_size={tp}",
        f"model.pipeline_model_parallel_size={pp}",
        f"train.micro_batch_size={mbs}",
        f"train.global_batch_size={mbs * dp * 3}",
        "data.source=mock",
    ]
    resolved = resolve_spec(load_spec(None, words))

    assert [finding for finding in check_spec(resolved) if finding.severity is Severity.ERROR] == []
    assert resolved["train.global_batch_size"] % (mbs * dp) == 0
    assert resolved["data.num_streams"] % dp == 0
