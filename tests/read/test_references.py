"""`${env:NAME}` and `${spec.KEY}`: filled in, typed, checked, with their origin; and what leads nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfmspec.check.rules import check_spec
from dfmspec.read.load import load_spec
from dfmspec.read.resolve import Resolved, resolve_spec


def resolved(folder: Path, text: str, *overrides: str) -> Resolved:
    (folder / "s.yaml").write_text(text)
    return resolve_spec(load_spec(folder / "s.yaml", overrides))


def codes(found: Resolved) -> dict[str, str]:
    return {finding.code: f"{finding.message} | {finding.hint}" for finding in check_spec(found, levels=("spec",))}


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFMSPEC_TEST_PLACE", "/scratch/me")
    monkeypatch.setenv("DFMSPEC_TEST_ITERATIONS", "20k")
    monkeypatch.delenv("DFMSPEC_TEST_UNSET", raising=False)


def test_a_variable_is_filled_in_in_every_layer(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("rng: {seed: '${env:DFMSPEC_TEST_UNSET:-7}'}\n")
    (tmp_path / "old.yaml").write_text("train: {train_iters: '${env:DFMSPEC_TEST_ITERATIONS}'}\n")
    found = resolved(
        tmp_path,
        "extends: ${env:DFMSPEC_TEST_UNSET:-base}.yaml\nconfig_file: old.yaml\n"
        "checkpoint: {save: '${env:DFMSPEC_TEST_PLACE}/c'}\nlauncher: {env: {HERE: '${env:DFMSPEC_TEST_PLACE}'}}\n",
        "checkpoint.load=${env:DFMSPEC_TEST_PLACE}/l",
    )

    assert not [code for code in codes(found) if code.startswith("SPC")]
    assert found["rng.seed"] == 7
    assert found["train.train_iters"] == 20_000
    assert found["checkpoint.save"] == "/scratch/me/c"
    assert found["checkpoint.load"] == "/scratch/me/l"
    assert found["launcher.env"] == {"HERE": "/scratch/me"}
    assert found.origins["checkpoint.save"].note == "${env:DFMSPEC_TEST_PLACE}/c"
    assert found.origins["checkpoint.save"].span.line == 3


def test_a_key_is_filled_in_with_its_type_whether_it_was_set_or_is_derived(tmp_path: Path) -> None:
    found = resolved(
        tmp_path,
        "name: of-${spec.model.num_layers}\nmodel: {num_layers: 4}\ncluster: {nproc_per_node: 4}\n"
        "train: {train_iters: 2k, eval_interval: '${spec.train.train_iters}', micro_batch_size: 2}\n"
        "dataset: {packing_buffer_size: '${spec.train.global_batch_size}'}\n"
        "launcher: {env: {BATCH: '${spec.train.global_batch_size}', RATE: 'at ${spec.optimizer.min_lr}'}}\n",
    )

    assert found["name"] == "of-4"
    assert found["train.eval_interval"] == 2000
    assert found["dataset.packing_buffer_size"] == 8  # 2 x DP 4, which nobody set
    assert found["launcher.env"] == {"BATCH": "8", "RATE": "at 9e-06"}
    assert found.origins["train.eval_interval"].note == "${spec.train.train_iters}"


def test_a_reference_sees_the_highest_layer(tmp_path: Path) -> None:
    found = resolved(
        tmp_path, "train: {train_iters: 10, eval_interval: '${spec.train.train_iters}'}\n", "train.train_iters=6"
    )

    assert found["train.eval_interval"] == 6


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("train: {train_iters: '${env:DFMSPEC_TEST_UNSET}'}", "SPC106", "the variable DFMSPEC_TEST_UNSET is not set"),
        ("train: {train_iters: '${spec.train.train_iter}'}", "SPC106", "${spec.train.train_iters}"),
        ("train: {train_iters: '${spec.train.train_iters}'}", "SPC108", "train.train_iters -> train.train_iters"),
        (
            "train: {train_iters: '${spec.train.eval_interval}', eval_interval: '${spec.train.train_iters}'}",
            "SPC108",
            "train.train_iters -> train.eval_interval -> train.train_iters",
        ),
        # By way of a derived value.
        ("train: {micro_batch_size: '${spec.train.global_batch_size}'}", "SPC108", "has no beginning"),
        ("train: {train_iters: '${spec.name}'}", "SPC202", "must be an integer"),
        ("train: {train_iters: '${env:DFMSPEC_TEST_PLACE}'}", "SPC202", "must be an integer"),
        ("train: {train_iters: '${spec.dataset.num_workers}'}\ndataset: {num_workers: 0}", "SPC204", "at least 1"),
        ("checkpoint: {save: '${train.train_iters}/x'}", "SPC308", "${spec.train.train_iters}"),
        ("checkpoint: {save: '${SCRATCH}/x'}", "SPC308", "${env:SCRATCH}"),
        ("checkpoint: {save: '${oc.env:SCRATCH}/x'}", "SPC308", "${env:SCRATCH}"),
        ("target: ${spec.name}", "SPC203", "must be one of"),
        ("launcher: {env: {A: '${env:MY_API_KEY:-x}'}}", "SEC101", "MY_API_KEY"),
    ],
)
def test_what_leads_nowhere_is_one_error_at_its_place(text: str, code: str, words: str, tmp_path: Path) -> None:
    found = resolved(tmp_path, f"cluster: {{nproc_per_node: 2}}\n{text}\n")
    errors = [finding for finding in check_spec(found, levels=("spec",)) if finding.severity == 2]

    assert {finding.code for finding in errors} == {code}
    assert words in codes(found)[code]
    assert all(finding.span.line >= 2 for finding in errors)


def test_what_a_variable_holds_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFMSPEC_TEST_PLACE", "${spec.name}/${env:HOME}")

    assert "SPC308" in codes(resolved(tmp_path, "checkpoint: {save: '${env:DFMSPEC_TEST_PLACE}'}\n"))


def test_the_reason_of_a_value_shows_what_was_written(tmp_path: Path) -> None:
    from dfmspec.plan.describe import explain

    found = resolved(tmp_path, "cluster: {nproc_per_node: 1}\ncheckpoint: {save: '${env:DFMSPEC_TEST_PLACE}/c'}\n")

    told = explain(found, "checkpoint.save")
    assert json.dumps("/scratch/me/c") in told
    assert "s.yaml:2:14, ${env:DFMSPEC_TEST_PLACE}/c" in told


def test_a_path_with_a_reference_is_the_same_from_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "s.yaml").write_text(
        "name: night\ncheckpoint: {save: '${spec.name}/ck', load: 'a/${spec.name}'}\n"
    )
    places = []
    for folder, name in ((tmp_path, "sub/s.yaml"), (tmp_path / "sub", "s.yaml")):
        monkeypatch.chdir(folder)
        found = resolve_spec(load_spec(name))
        places.append([(folder / found[key]).resolve() for key in ("checkpoint.save", "checkpoint.load")])

    assert places[0] == places[1] == [tmp_path / "sub" / "night" / "ck", tmp_path / "sub" / "a" / "night"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("checkpoint: {save: '/ckpt/${spec.dataset.path}'}", "is null, which no text can hold"),
        ("checkpoint: {save: '/ckpt/${spec.launcher.env}'}", "is no single value"),
        (
            f"name: {'a' * 99}\nlauncher: {{env: {{A: '{'${spec.name}' * 700}'}}}}",
            "a text of more than 65,536 letters",
        ),
    ],
)
def test_a_reference_that_no_text_can_hold_is_told(text: str, words: str, tmp_path: Path) -> None:
    assert words in codes(resolved(tmp_path, f"cluster: {{nproc_per_node: 1}}\n{text}\n"))["SPC106"]


def test_what_a_variable_holds_is_not_printed_where_it_is_of_the_wrong_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFMSPEC_TEST_PLACE", "hf_supersecret123456789")
    found = codes(
        resolved(tmp_path, "launcher: {env: '${env:DFMSPEC_TEST_PLACE}'}\nrng: {seed: '${env:DFMSPEC_TEST_PLACE}'}\n")
    )

    assert "supersecret" not in str(found)
    assert "${env:DFMSPEC_TEST_PLACE}" in found["SPC202"]
