"""Metadata of one dataset for both Energons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dfmspec.data.energon_metadata import metadata_files
from dfmspec.data.upgrade import lacking, upgrade
from dfmspec.errors import DataError
from tests.conftest import dfmspec


@pytest.fixture
def older(dataset: Path, tmp_path: Path) -> Path:
    """A set as Energon 7 prepares it."""
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    (folder / ".nv-meta" / ".info.yaml").unlink()
    return folder


def test_what_is_prepared_is_for_both(dataset: Path) -> None:
    counts = json.loads((dataset / ".nv-meta" / ".info.json").read_text())["shard_counts"]

    assert lacking(dataset, 6) == lacking(dataset, 7) == []
    assert yaml.safe_load((dataset / ".nv-meta" / ".info.yaml").read_text()) == {"shard_counts": counts}


def test_an_upgrade_adds_what_is_missing_and_touches_nothing_else(older: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in older.rglob("*") if path.is_file()}
    guarded = metadata_files(older)
    assert lacking(older, 6) == [".info.yaml"]
    first = dfmspec("data", "upgrade", older)
    again = dfmspec("data", "upgrade", older)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in older.rglob("*") if path.is_file()}

    assert first.stdout.split() == [str(older / ".nv-meta" / ".info.yaml")]
    assert again.stdout == ""
    assert {path: after[path] for path in before} == before
    assert lacking(older, 6) == []
    assert metadata_files(older) == guarded  # a plan's guard stays


def test_a_split_as_json_becomes_one_as_yaml(older: Path) -> None:
    split = older / ".nv-meta" / "split.yaml"
    values = yaml.safe_load(split.read_text())
    split.with_suffix(".json").write_text(json.dumps(values))
    split.unlink()
    upgrade(older)

    assert yaml.safe_load(split.read_text()) == {
        key: values[key] for key in ("split_parts", "exclude") if key in values
    }


def test_inspect_says_which_targets_can_read_a_set(older: Path, dataset: Path) -> None:
    found = json.loads(dfmspec("data", "inspect", older).stdout)["read_by"]
    whole = json.loads(dfmspec("data", "inspect", dataset).stdout)["read_by"]

    assert found["megatron_core"] is True
    assert found["dfm"] == f"no .nv-meta/.info.yaml; run: dfmspec data upgrade {older}"
    assert set(whole.values()) == {True}


@pytest.mark.parametrize("harm", ["no folder", "empty", "damaged"])
def test_what_has_no_metadata_is_told(harm: str, older: Path, tmp_path: Path) -> None:
    folder = older
    if harm == "no folder":
        folder = tmp_path / "nowhere"
    elif harm == "empty":
        shutil.rmtree(older / ".nv-meta")
    else:
        (older / ".nv-meta" / ".info.json").write_text("{")
    done = dfmspec("data", "upgrade", folder)

    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert str(folder) in done.stderr
    if harm != "no folder":
        with pytest.raises(DataError):
            upgrade(older)


def test_metadata_that_an_energon_left_behind_is_told_where_it_is_read(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(dataset, folder)
    (folder / ".nv-meta" / ".info.yaml").write_text("shard_counts: {other.tar: 3}\n")
    (tmp_path / "spec.yaml").write_text(f"dataset: {{path: {folder}}}\n")
    theirs = dfmspec("validate", "spec.yaml", "target=dfm", cwd=tmp_path).stdout
    ours = dfmspec("validate", "spec.yaml", "target=megatron_core", cwd=tmp_path).stdout

    assert "counts other samples in .info.json, which Energon 7 reads, than in .info.yaml, which 6 reads" in theirs
    assert "DAT103" not in ours
