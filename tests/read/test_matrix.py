"""matrix: which cells it has, what each sets, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.check.rules import check_spec
from dfmspec.read.load import Spec, load_spec
from dfmspec.read.matrix import MAX_CELLS, chosen
from dfmspec.read.resolve import Resolved, resolve_spec

MATRIX = """\
train: {train_iters: 100}
checkpoint: {save: c}
matrix:
  optimizer.lr: [1.0e-4, 3.0e-4]
  train.micro_batch_size: [1, 2]
  exclude:
    - {optimizer.lr: 3.0e-4, train.micro_batch_size: 1}
  include:
    - {optimizer.lr: 1.0e-3, train.train_iters: 20k}
"""


def spec_of(folder: Path, text: str, *overrides: str) -> Spec:
    (folder / "s.yaml").write_text(text)
    return load_spec(folder / "s.yaml", overrides)


def cells(folder: Path, text: str, *overrides: str) -> list[Resolved]:
    spec = spec_of(folder, text, *overrides)
    assert not [problem for problem in spec.problems if problem.severity == 2]
    return [resolve_spec(load_spec(folder / "s.yaml", overrides, cell=cell)) for cell in spec.cells]


def test_cells_are_the_product_less_what_is_excluded_and_what_is_included(tmp_path: Path) -> None:
    found = cells(tmp_path, MATRIX)

    assert [(cell["optimizer.lr"], cell["train.micro_batch_size"], cell["train.train_iters"]) for cell in found] == [
        (1e-4, 1, 100),
        (1e-4, 2, 100),
        (3e-4, 2, 100),
        (1e-3, 1, 20_000),
    ]
    assert [cell["name"] for cell in found] == [
        "s-lr-0.0001_micro_batch_size-1",
        "s-lr-0.0001_micro_batch_size-2",
        "s-lr-0.0003_micro_batch_size-2",
        "s-lr-0.001_train_iters-20k",
    ]
    assert {cell["run.group"] for cell in found} == {"s"}
    origin = found[1].origins["optimizer.lr"]
    assert (origin.layer, origin.span.line, origin.span.column) == ("matrix", 4, 18)


def test_each_cell_has_its_own_checkpoints(tmp_path: Path) -> None:
    saves = [cell["checkpoint.save"] for cell in cells(tmp_path, MATRIX)]

    assert len({*saves}) == 4
    assert all("/c/" in save for save in saves)


def test_a_matrix_lies_under_the_command_line_and_a_spec_s_axis_over_its_base_s(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("matrix: {optimizer.lr: [1.0e-4, 2.0e-4], rng.seed: [1, 2, 3]}\n")
    own = "extends: base.yaml\nmatrix: {rng.seed: [4, 5], train.train_iters: [7]}\n"

    found = cells(tmp_path, own)
    assert [(cell["optimizer.lr"], cell["rng.seed"], cell["train.train_iters"]) for cell in found] == [
        (1e-4, 4, 7),
        (1e-4, 5, 7),
        (2e-4, 4, 7),
        (2e-4, 5, 7),
    ]
    # An axis that the command line sets is none; a null takes one out.
    assert len(cells(tmp_path, own, "rng.seed=9")) == 2
    assert {cell["rng.seed"] for cell in cells(tmp_path, own, "rng.seed=9")} == {9}
    assert len(cells(tmp_path, own.replace("[4, 5]", "null"))) == 2


def test_a_cell_may_refer_and_is_referred_to(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        "train: {eval_interval: '${spec.train.train_iters}'}\n"
        "matrix: {train.train_iters: [8, 16], optimizer.min_lr: ['${spec.optimizer.lr}']}\n",
    )

    assert [cell["train.eval_interval"] for cell in found] == [8, 16]
    assert {cell["optimizer.min_lr"] for cell in found} == {9e-5}


def test_names_are_words_for_folders_and_differ(tmp_path: Path) -> None:
    long = "/data/" + "x" * 200
    found = cells(tmp_path, f"matrix: {{dataset.path: [/a b, /a/b, {long}1, {long}2], launcher.setup: [[a], [b]]}}\n")
    names = [cell["name"] for cell in found]

    assert len({*names}) == 8
    assert all(len(name) < 200 and "/" not in name and " " not in name for name in names)


def test_the_findings_of_a_cell_stand_at_its_value(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "matrix:\n  train.train_iters: [4, 0]\n  optimizer.lrr: [1]\n")
    found = check_spec(resolve_spec(load_spec(tmp_path / "s.yaml", cell=spec.cells[1])), levels=("spec",))
    errors = {(finding.code, finding.span.line, finding.span.column) for finding in found if finding.severity == 2}

    assert errors == {("SPC204", 2, 26), ("SPC201", 3, 3)}


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        ("{optimizer.lr: 1.0e-4}", "must be a list"),
        ("{optimizer.lr: []}", "must be a list"),
        ("{optimizer.lr: [1.0e-4, 1.0e-4]}", "has a value twice"),
        ("{target: [dfm]}", "is no axis"),
        ("{optimizer.lr: [1.0e-4], exclude: {optimizer.lr: 1}}", "must be a list of mappings"),
        ("{optimizer.lr: [1.0e-4], exclude: [{rng.seed: 1}]}", "is no axis"),
        ("{optimizer.lr: [1.0e-4], include: [1]}", "must be a list of mappings"),
        (f"{{rng.seed: {list(range(MAX_CELLS + 1))}}}", "257 cells, and at most 256"),
        ("{optimizer.lr: [1.0e-4], exclude: [{optimizer.lr: 1.0e-4}]}", "no cell is left"),
        ("{train.train_iters: [20k, 20000]}", "has a value twice"),
        ("{optimizer: [1]}", "is no key with a value"),
        ("{'': [1]}", "is no key with a value"),
        ("{launcher.env: [{A: b}], launcher.env.A: [c]}", "is all of what launcher.env.A is a part of"),
        ("{includes: [{rng.seed: 1}]}", "includes is no key"),
        (f"{{rng.seed: {list(range(999))}, train.train_iters: {list(range(1, 999))}}}", "997,002 cells"),
    ],
)
def test_a_matrix_that_is_not_certain_has_no_cells(matrix: str, words: str, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, f"matrix: {matrix}\n")
    (problem,) = spec.problems

    assert not spec.cells
    assert problem.code == "SPC109"
    assert words in problem.message
    assert problem.span.line == 1


def test_a_cell_is_chosen_by_its_name_or_its_number(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, MATRIX)

    assert chosen(spec.cells, "3") == spec.cells[2]
    assert chosen(spec.cells, "lr-0.001_train_iters-20k") == spec.cells[3]
    assert chosen(spec.cells, "0") is chosen(spec.cells, "5") is chosen(spec.cells, "lr") is None


def test_values_are_the_same_by_their_type_however_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFMSPEC_TEST_RATE", "3.0e-4")
    found = cells(
        tmp_path,
        "matrix:\n  train.train_iters: [20k, 30k]\n  optimizer.lr: ['${env:DFMSPEC_TEST_RATE}', 1.0e-4]\n"
        "  exclude: [{train.train_iters: 20000, optimizer.lr: 3.0e-4}]\n"
        "  include: [{train.train_iters: 30000, optimizer.lr: 1.0e-4}]\n",
    )

    assert [(cell["train.train_iters"], cell["optimizer.lr"]) for cell in found] == [
        (20_000, 1e-4),
        (30_000, 3e-4),
        (30_000, 1e-4),
    ]


def test_entries_are_the_same_as_cells_by_their_type_too(tmp_path: Path) -> None:
    found = cells(
        tmp_path,
        "matrix:\n  train.train_iters: [10000, 20000, 30k]\n"
        "  exclude: [{train.train_iters: 20k}]\n  include: [{train.train_iters: 10k}]\n",
    )

    assert sorted(cell["train.train_iters"] for cell in found) == [10_000, 30_000]


def test_each_cell_writes_into_folders_of_its_own(tmp_path: Path) -> None:
    found = cells(tmp_path, "logger: {tensorboard_dir: tb}\nmatrix: {rng.seed: [1, 2]}\n")

    assert len({cell["logger.tensorboard_dir"] for cell in found}) == 2
