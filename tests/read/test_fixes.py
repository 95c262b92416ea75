"""dfmspec fix: only what was meant changes, and everything else stays, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmspec.diagnostics import Diagnostic, Edit, Severity, Span
from dfmspec.read.document import parse_document
from dfmspec.read.fixes import fixed, scalar
from tests.conftest import dfmspec

BEFORE = """\
# my run
train:
  train_iters: 500   # short
  gbs: 8
  micro_batch_size: "1"
scheduler: {lr_decay_iters: 10000}  # old
model: {sequence_parallel: on, num_layer: 12}
checkpoint:
  load_checkpoint: ckpt/iter_5000/   # from here
"""
AFTER = """\
# my run
train:
  train_iters: 500   # short
  global_batch_size: 8
  micro_batch_size: 1
scheduler: {lr_decay_iters: 500}  # old
model: {sequence_parallel: true, num_layers: 12}
checkpoint:
  load: ckpt   # from here
  ckpt_step: 5000
"""


def test_names_quoted_numbers_and_stale_copies_are_mended_in_place(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(BEFORE)
    file.chmod(0o640)
    shown = dfmspec("fix", "--diff", str(file))
    assert shown.returncode == 1
    assert "+  global_batch_size: 8" in shown.stdout
    assert file.read_text() == BEFORE

    mended = dfmspec("fix", str(file))
    assert mended.returncode == 1
    assert mended.stderr.splitlines()[-1] == "3 errors left that fix does not mend; dfmspec validate shows them"
    assert file.read_text() == AFTER
    assert file.stat().st_mode & 0o777 == 0o640
    assert dfmspec("fix", "--diff", str(file)).stdout == ""  # nothing is left to do


def test_what_may_change_the_meaning_needs_the_word(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("target: dfm\ncluster: {nproc_per_node: 8}\ntrain: {micro_batch_size: 2, global_batch_size: 30}\n")
    assert dfmspec("fix", "--diff", str(file)).stdout == ""

    assert dfmspec("fix", "--unsafe", str(file)).returncode == 0
    assert yaml.safe_load(file.read_text())["train"] == {"micro_batch_size": 1, "global_batch_size": 32}


def test_a_key_that_is_there_already_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    text = "train: {gbs: 8, global_batch_size: 16}\ncheckpoint: {checkpoint_dir: a, save: b}\n"
    file.write_text(text)
    dfmspec("fix", str(file))

    assert file.read_text() == text


def test_crlf_and_a_missing_last_newline_stay(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_bytes(b"train:\r\n  gbs: 8\r\ncheckpoint:\r\n  checkpoint_dir: a")
    dfmspec("fix", str(file))

    assert file.read_bytes() == b"train:\r\n  global_batch_size: 8\r\ncheckpoint:\r\n  save: a"


_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=6)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(_NAMES, st.dictionaries(_NAMES, _VALUES, min_size=1, max_size=4), min_size=1, max_size=4),
    st.data(),
    st.booleans(),
)
def test_an_edit_changes_its_entry_and_nothing_else(data: dict, draw: st.DataObject, flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True)
    document = parse_document(text.encode(), "spec.yaml")
    section = draw.draw(st.sampled_from(sorted(document.data)))
    if not isinstance(document.data[section], dict) or not document.data[section]:
        return
    name = draw.draw(st.sampled_from(sorted(document.data[section])))
    edit = draw.draw(
        st.sampled_from(
            [
                Edit("set", (section, name), draw.draw(st.none() | st.booleans() | st.integers() | _NAMES)),
                Edit("rename", (section, name), "renamed"),
            ]
        )
    )
    finding = Diagnostic(Span("spec.yaml"), "XXX101", "x", Severity.ERROR, "m", fix=(edit,))
    after, mended = fixed(document, [finding])
    result = parse_document(after.encode(), "spec.yaml").data

    expected = {key: dict(value) if isinstance(value, dict) else value for key, value in document.data.items()}
    if not mended:
        assert after == text
        return
    if edit.kind == "set":
        expected[section][name] = edit.value
    else:
        expected[section]["renamed"] = expected[section].pop(name)
    assert result == expected
    changed = [line for line in after.splitlines() if line not in text.splitlines()]
    assert flow or len(changed) <= 1 + str(edit.value).count("\n")


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12))
def test_a_text_is_written_so_that_every_reader_has_it_back(text: str) -> None:
    written = f"v: {scalar(text)}"

    assert parse_document(written.encode(), "x").data == {"v": text}
    assert yaml.safe_load(written) == {"v": text}


@pytest.mark.parametrize("value", [1e-4, 1e22, 0.1, 1, True, None, -0.0])
def test_a_number_is_written_so_that_every_reader_has_it_back(value: object) -> None:
    assert (
        parse_document(f"v: {scalar(value)}".encode(), "x").data
        == {"v": value}
        == yaml.safe_load(f"v: {scalar(value)}")
    )


UPGRADES = [
    (
        "validation:\n  eval_iters: 3  # few\n  eval_interval: 10\ntrain:\n  train_iters: 9\n",
        "train:\n  eval_iters: 3  # few\n  eval_interval: 10\n  train_iters: 9\n",
    ),
    (
        "# mine\nvalidation:\n    eval_iters: 3  # few\nmodel: {}\n",
        "# mine\ntrain:\n    eval_iters: 3  # few\nmodel: {}\n",
    ),
    ("train:\n  train_iters: 9\nvalidation:\n  eval_iters: 3", "train:\n  eval_iters: 3\n  train_iters: 9\n"),
    ("validation: {eval_iters: 3}\n", None),
    ("validation:\n  eval_iters: 3\ntrain: {train_iters: 9}\n", None),
]


@pytest.mark.parametrize(("before", "after"), UPGRADES)
def test_keys_of_another_version_are_moved_where_each_has_a_line_of_its_own(
    before: str, after: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(before)
    told = dfmspec("validate", file, "--check", "spec")
    done = dfmspec("fix", file, "--upgrade")

    assert "dfmspec fix --upgrade" in told.stdout
    assert yaml.safe_load(file.read_text()) == yaml.safe_load(after or before)
    assert file.read_text().strip() == (after or before).strip()
    assert done.returncode == (0 if after else 1)
    if after:
        assert "validation.eval_iters -> train.eval_iters" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "rng: {seed: '${env:DFMSPEC_TEST_NUMBER}'}\n",
        "logger: {log_interval: 10}\nmatrix: {logger.log_interval: [2.0, 3]}\n",
    ],
)
def test_a_reference_is_not_written_over_nor_a_key_for_its_axis(text: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    done = dfmspec("fix", file, DFMSPEC_TEST_NUMBER="2.0")

    assert file.read_text() == text
    assert done.returncode == 1  # as validate finds errors
