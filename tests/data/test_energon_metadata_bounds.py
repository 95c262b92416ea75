"""Energon's metadata are read up to a size, and patterns of shards expanded up to a number."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dfmspec.bounded import METADATA_BYTES
from dfmspec.data.energon_metadata import faults, shard_counts, split_shards


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    """The folder of metadata of a dataset with two shards."""
    folder = tmp_path / ".nv-meta"
    folder.mkdir()
    (folder / ".info.json").write_text(json.dumps({"shard_counts": {"0.tar": 1, "1.tar": 1}}))
    (folder / "split.yaml").write_text("split_parts: {train: ['{0..1}.tar']}")
    return folder


def test_a_pattern_stands_for_its_shards(metadata: Path) -> None:
    assert split_shards(metadata.parent) == {"train": ["0.tar", "1.tar"]}
    assert list(faults(metadata.parent)) == []


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..999}{0..999}{0..999}.tar", "{0..0}" * 3000])
def test_a_pattern_of_more_shards_than_there_can_be_is_a_fault(metadata: Path, pattern: str) -> None:
    (metadata / "split.yaml").write_text(f"split_parts: {{train: ['{pattern}']}}")

    assert split_shards(metadata.parent) is None
    assert [fault.partition("split.yaml ")[2] for fault in faults(metadata.parent)] == [
        "names more shards than are looked at, 1000000"
    ]


def test_a_list_that_is_named_often_is_a_fault(metadata: Path) -> None:
    names = "".join(f"s{number}: *x, " for number in range(1000))
    (metadata / "split.yaml").write_text(f"split_parts: {{x: &x [{'a, ' * 1000}], {names}}}")
    (fault,) = faults(metadata.parent)

    assert split_shards(metadata.parent) is None
    assert "more than 300000 values, through aliases" in fault


def test_a_file_that_is_too_large_is_a_fault_that_says_so(metadata: Path) -> None:
    (metadata / ".info.json").write_bytes(b" " * (METADATA_BYTES + 1))
    (fault,) = faults(metadata.parent)

    assert shard_counts(metadata.parent) is None
    assert "more than 16 MiB" in fault


def test_a_device_or_a_pipe_for_metadata_is_as_if_it_were_not_there(metadata: Path) -> None:
    for name in (".info.json", "split.yaml"):
        (metadata / name).unlink()
    os.mkfifo(metadata / ".info.json")
    (metadata / "split.yaml").symlink_to("/dev/zero")

    assert len(list(faults(metadata.parent))) == 2
