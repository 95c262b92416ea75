"""Layers, precedence, origins and structural findings."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from dfmspec.check.report import reporter
from dfmspec.check.rules import all_findings
from dfmspec.read import document, load
from dfmspec.read.load import MAX_FILES, Spec, load_spec
from dfmspec.read.resolve import resolve_spec
from dfmspec.spec.iterations import split_iteration
from tests.read.hostile import hostile


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


def test_overrides_of_one_mapping_add_up(tmp_path: Path) -> None:
    """Each sets its own entry, and no other is lost; a whole mapping takes the place of what was there."""
    file = tmp_path / "spec.yaml"
    file.write_text("spec_version: 1\nlauncher: {env: {OWN: a, BOTH: a}}\n")
    entries = ["launcher.env.BOTH=b", "launcher.env.DEBUG=1"]

    assert load_spec(file, entries).values["launcher.env"] == {"OWN": "a", "BOTH": "b", "DEBUG": "1"}
    assert load_spec(file, [*entries, "launcher.env={ONLY: c}"]).values["launcher.env"] == {"ONLY": "c"}
    assert not load_spec(file, entries).problems


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


# What a stranger's spec may cost.


def laid(folder: Path, files: dict[str, str]) -> tuple[Spec, list[str]]:
    """A spec of some files, and the names of those that were read, each time anew."""
    for name, text in files.items():
        write(folder, name, text)
    read: list[str] = []
    original = load.read_document

    def recorded(file: Any, *args: Any, **options: Any) -> document.Document:
        read.append(Path(file).name)
        return original(file, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_document", recorded)
        return load_spec(folder / "spec.yaml"), read


def test_a_diamond_of_files_reads_each_once(tmp_path: Path) -> None:
    files = {f"{n}.yaml": f"extends: [{n + 1}.yaml, {n + 1}.yaml]\nconfig_file: {n + 1}.yaml\n" for n in range(25)}
    files |= {"25.yaml": "rng: {seed: 7}\n", "spec.yaml": "extends: [0.yaml, 0.yaml]\n"}
    spec, read = laid(tmp_path, files)

    assert sorted(read) == sorted(files)
    assert spec.problems == ()
    assert spec.values["rng.seed"] == 7


def test_a_file_under_two_others_counts_where_it_is_highest(tmp_path: Path) -> None:
    files = {
        "base.yaml": "rng: {seed: 1}\n",
        "left.yaml": "extends: base.yaml\nrng: {seed: 2}\ntrain: {train_iters: 2}\n",
        "right.yaml": "extends: base.yaml\noptimizer: {lr: 3.0}\n",
        "spec.yaml": "extends: [left.yaml, right.yaml]\n",
    }
    spec, _ = laid(tmp_path, files)

    assert spec.values["rng.seed"] == 1  # right.yaml, with what it builds on, lies over left.yaml
    assert spec.values["train.train_iters"] == 2
    assert [Path(document.file).name for document in spec.documents] == [
        "spec.yaml",
        "left.yaml",
        "right.yaml",
        "base.yaml",
    ]


def test_layers_lie_as_if_each_reference_were_laid_anew(tmp_path: Path) -> None:
    keys = ("rng.seed", "train.train_iters", "train.eval_iters", "model.num_layers", "cluster.nnodes")
    rng = random.Random(0)
    for case in range(100):
        # Files each of which sets some keys to its own number, and lies over some of those behind it.
        folder = tmp_path / str(case)
        folder.mkdir()
        under: dict[int, list[int]] = {}
        sets: dict[int, list[str]] = {}
        for number in range(1, 7):
            behind = list(range(number + 1, 7))
            under[number] = rng.choices(behind, k=rng.randrange(4)) if behind else []
            sets[number] = rng.sample(keys, 2)
            names = ", ".join(f"{base}.yaml" for base in under[number])
            own = [f"{key.partition('.')[0]}: {{{key.partition('.')[2]}: {number}}}" for key in sets[number]]
            if own[0].split(":")[0] == own[1].split(":")[0]:
                own.pop()
                sets[number].pop()
            write(folder, f"{number}.yaml", "\n".join([f"extends: [{names}]", *own, ""]))

        spec = load_spec(folder / "1.yaml")
        for key in keys:
            highest = next((number for number in reversed(every_layer(1, under)) if key in sets[number]), None)
            assert highest is None or spec.values[key] == highest, (case, key)


def every_layer(number: int, under: dict[int, list[int]]) -> list[int]:
    """A file's layers, lowest first: each reference with all under it, then the file itself."""
    layers = []
    for base in under[number]:
        layers += every_layer(base, under)
    return [*layers, number]


def test_no_more_files_are_read_than_a_spec_may_build_on_and_one_finding_names_the_next(tmp_path: Path) -> None:
    chain = {f"{n}.yaml": f"extends: {n + 1}.yaml\n" for n in range(5000)}
    spec, read = laid(tmp_path, chain | {"spec.yaml": "extends: 0.yaml\n"})
    (problem,) = spec.problems

    assert len(read) == MAX_FILES + 1
    assert problem.code == "SPC104"
    assert f"{MAX_FILES}.yaml is one more than the {MAX_FILES} files" in problem.message
    assert str(problem.span).endswith(f"{MAX_FILES - 1}.yaml:1:10")


def test_all_layers_share_one_budget(tmp_path: Path) -> None:
    many = "a: [" + "1, " * 60_000 + "]\n"
    spec, _ = laid(tmp_path, {"spec.yaml": "extends: [a.yaml, b.yaml]\n", "a.yaml": many, "b.yaml": many})

    assert [problem.code for problem in spec.problems if "values" in problem.message] == ["SPC101"]


@pytest.mark.parametrize("key", ["extends", "config_file"])
def test_a_device_or_a_pipe_under_a_spec_is_a_finding_at_once(tmp_path: Path, key: str) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, kind in (("/dev/zero", "a device"), ("fifo.yaml", "a pipe")):
        found = problems(write(tmp_path, "spec.yaml", f"{key}: {name}\n"))
        assert f"{name} cannot be read: it is {kind}; name a regular file" in found["SPC104"]


def test_so_many_unknown_keys_have_a_suggestion_and_all_have_a_finding(tmp_path: Path) -> None:
    keys = "".join(f"  num_layer{number}: 1\n" for number in range(5000))
    found = load_spec(write(tmp_path, "spec.yaml", f"model:\n{keys}")).problems

    assert len(found) == 5000
    assert sum("did you mean" in problem.hint for problem in found) == 100


def test_keys_of_digits_are_found_each_at_its_place(tmp_path: Path) -> None:
    names = [f"'{number}'" for number in range(3000)] + ["'+7'", "'++8'", "'" + "9" * 900 + "'"]
    lines = "".join(f"    {name}: 3\n" for name in names)
    found = load_spec(write(tmp_path, "spec.yaml", f"launcher:\n  env:\n{lines}")).problems

    codes = [problem.code for problem in found]
    assert codes.count("SPC204") == len(names)
    assert codes.count("SPC202") >= len(names) - 2
    assert {problem.span.line for problem in found} == set(range(3, len(names) + 3))


def test_no_hostile_spec_needs_more_visits_or_calls_than_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a small limit, so that a cost which grows faster than the limit is seen: reading, rules and report."""
    most = 1000
    budgets: list[document.Budget] = []

    class Recorded(document.Budget):
        def __init__(self) -> None:
            super().__init__()
            budgets.append(self)

    monkeypatch.setattr(document, "MAX_VALUES", most)
    monkeypatch.setattr(load, "Budget", Recorded)
    rng = random.Random(0)
    calls = 0

    def counted(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in hostile(rng).items():
            write(folder, name, text)
        calls = 0
        sys.setprofile(counted)
        try:
            resolved = resolve_spec(load_spec(folder / "spec.yaml"))
            findings = all_findings(resolved)
            reporter("full")(findings, {each.file: each.text for each in resolved.spec.documents})
        finally:
            sys.setprofile(None)
        assert budgets.pop().values <= most + 5000 // 64 + 2, number
        assert calls < 150_000, number
