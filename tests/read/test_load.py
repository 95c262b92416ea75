"""Layers, precedence, origins and structural findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.read.load import load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.iterations import split_iteration


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(path: Path | None, *overrides: str) -> dict[str, str]:
    return {problem.code: f"{problem.message} | {problem.hint}" for problem in load_spec(path, overrides).problems}


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "optimizer: {lr: 1.0e-3}\ntrain: {train_iters: 7}\nrng: {seed: 1}\n")
    write(tmp_path, "old.yaml", "train: {train_iters: 8}\nrng: {seed: 2}\n")
    spec = load_spec(
        write(tmp_path, "s.yaml", "extends: [base.yaml]\nconfig_file: old.yaml\nrng: {seed: 3}\nrecipe: dit_s\n"),
        ["rng.seed=4"],
    )

    assert (spec.values["optimizer.lr"], spec.values["train.train_iters"], spec.values["rng.seed"]) == (1e-3, 8, 4)
    assert spec.values["model.num_layers"] == 12
    layers = [
        spec.origins[key].layer
        for key in ("optimizer.lr", "train.train_iters", "rng.seed", "model.num_layers", "train.eval_iters")
    ]
    assert layers == ["extends", "config file", "override", "recipe dit_s", "default"]
    assert str(spec.origins["train.train_iters"].span).endswith("old.yaml:1:9")


def test_derived_values_follow_their_sources() -> None:
    resolved = resolve_spec(
        load_spec(
            None, ["model.hidden_size=512", "model.num_attention_heads=8", "train.train_iters=100", "optimizer.lr=3e-4"]
        )
    )

    assert resolved["model.ffn_hidden_size"] == 2048
    assert resolved["model.kv_channels"] == 64
    assert resolved["scheduler.lr_decay_iters"] == 100
    assert resolved["optimizer.min_lr"] == 3e-5
    assert resolved.origins["optimizer.min_lr"].note == "0.1 x optimizer.lr"


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("model.num_layer=3", "SPC201", "did you mean model.num_layers?"),
        ("model.tp=2", "SPC201", "did you mean model.tensor_model_parallel_size?"),
        ("optim.lr=1", "SPC201", "did you mean optimizer?"),
        ("train.lr=1", "SPC201", "did you mean optimizer.lr?"),
        ("model.num_layers=many", "SPC202", "must be an integer"),
        ("model.num_layers=2.0", "SPC202", "write 2"),
        ("model.sequence_parallel=yes", "SPC202", "true or false"),
        ("model.num_layers=0", "SPC204", "at least 1"),
        ("optimizer.lr=-1", "SPC204", "more than 0"),
        ("scheduler.lr_decay_style=cosin", "SPC203", "did you mean cosine?"),
        ("recipe=dit_xxl", "SPC203", "did you mean dit_xl?"),
        ("cluster.master_addr=$(reboot)", "SPC204", "master_addr"),
        ("logger.wandb_project=x", "SPC206", "target dfm"),
        ("name=../up", "SPC204", "name"),
        ("cluster.nnodes=100000000", "SPC204", "at most"),
        ("model.hidden_size=1000000000000000016", "SPC204", "at most"),
        ("optimizer.lr=nan", "SPC202", "must be a number"),
    ],
)
def test_what_is_not_legal_is_said_with_a_way_out(override: str, code: str, words: str) -> None:
    found = problems(None, override)

    assert list(found) == [code]
    assert words in found[code]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("checkpoint.save='/data/x'", "checkpoint.save", "/data/x"),
        ('checkpoint.save="a b"', "checkpoint.save", "a b"),
        ("checkpoint.save=''", "checkpoint.save", ""),
        (r"checkpoint.save='it\'s'", "checkpoint.save", "it's"),
        ("name='null'", "name", "null"),
        ("checkpoint.save='a'b'", "checkpoint.save", "'a'b'"),
        ("recipe='dit_s'", "recipe", "dit_s"),
        ("checkpoint.load_checkpoint='/c/iter_5'", "checkpoint.ckpt_step", 5),
    ],
)
def test_quotes_of_an_override_are_hydras_and_not_part_of_the_text(override: str, key: str, value: object) -> None:
    assert load_spec(None, [override]).values[key] == value


def test_a_quoted_number_is_text_as_it_is_upstream() -> None:
    assert list(problems(None, "train.train_iters='10'")) == ["SPC202"]
    assert (
        load_spec(None, ["target='dfm'", "mixed_precision='bf16-mixed'"]).values["mixed_precision.recipe"]
        == "bf16_mixed"
    )


def test_all_findings_come_in_one_pass(tmp_path: Path) -> None:
    path = write(tmp_path, "s.yaml", "model: {num_layer: 3, hidden_size: wide}\ntrain: {train_iters: -1}\nfoo: 1\n")

    assert sorted(problem.code for problem in load_spec(path).problems) == ["SPC201", "SPC201", "SPC202", "SPC204"]


def test_the_how_tos_names_are_taken_and_said(tmp_path: Path) -> None:
    path = write(tmp_path, "s.yaml", "checkpoint: {checkpoint_dir: out}\n")
    spec = load_spec(path, ["checkpoint.load_checkpoint=/ckpt/iter_5000/"])

    assert Path(spec.values["checkpoint.save"]).resolve() == tmp_path / "out"
    assert (spec.values["checkpoint.load"], spec.values["checkpoint.ckpt_step"]) == ("/ckpt", 5000)
    assert [problem.code for problem in spec.problems] == ["CKP101", "CKP101"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/iter_5000/", ("a", 5000)),
        ("/a/iter_0005000", ("/a", 5000)),
        ("iter_3", (".", 3)),
        ("a/b", ("a/b", None)),
        ("a/iter_x", ("a/iter_x", None)),
    ],
)
def test_an_iteration_folder_is_split_from_its_parent(path: str, expected: tuple[str, int | None]) -> None:
    assert split_iteration(path) == expected


def test_a_base_that_is_missing_or_circular_is_a_finding(tmp_path: Path) -> None:
    assert "SPC104" in problems(write(tmp_path, "a.yaml", "extends: nowhere.yaml\n"))
    assert "SPC105" in problems(write(tmp_path, "b.yaml", "extends: b.yaml\n"))
    assert "SPC202" in problems(write(tmp_path, "c.yaml", "extends: 3\nconfig_file: [a]\n"))
