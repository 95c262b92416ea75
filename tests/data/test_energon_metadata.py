"""What is left of a dataset after what its metadata excludes, and which shards are there."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta
from megatron.energon.flavors.webdataset.sharder import Sharder

from dfmspec.data.energon_metadata import (
    excluded,
    faults,
    shards_there,
    split_counts,
    split_shards,
    streams_without_sample,
)

SHARD = 6
"""Samples of a shard."""


def made(folder: Path, *shards: str, exclude: object = ()) -> Path:
    """A dataset whose shards have samples s0 to s5, all of them of the training split."""
    for shard in shards:
        (folder / shard).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / shard, "w") as tar:
            for index in range(SHARD):
                for part in ("pth", "pickle", "json"):
                    tar.addfile(tarfile.TarInfo(f"s{index}.{part}"), io.BytesIO())
    metadata = folder / ".nv-meta"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / ".info.json").write_text(json.dumps({"shard_counts": dict.fromkeys(shards, SHARD)}))
    left_out = list(exclude) if isinstance(exclude, tuple) else exclude
    (metadata / "split.yaml").write_text(json.dumps({"split_parts": {"train": list(shards)}, "exclude": left_out}))
    return folder


def _left_by_energon(folder: Path) -> int:
    """How many samples Energon itself would hand out."""
    try:
        meta = WebdatasetMeta.from_config(EPath(str(folder)), split_part="train")
    except Exception as error:
        assert "No shards found" in str(error), error  # every shard is excluded
        return 0
    names = [f"{shard.name}/s{index}" for shard in meta.shards for index in range(shard.count)]
    return sum(name not in meta.sample_excludes for name in names)


def test_what_is_excluded_is_not_counted_as_energon_does_not_read_it(tmp_path: Path) -> None:
    chance = random.Random(5)
    forms = [
        "a.tar",
        "part/b.tar",
        "a.tar/s{0..3}",
        "part/b.tar/s{1,4}",
        "c{1..2}.tar",
        "a.tar/none",
        "c1.tar/s0",
        "z.tar",
    ]
    shards = ("a.tar", "part/b.tar", "c1.tar", "c2.tar")
    for number in range(40):
        folder = made(tmp_path / str(number), *shards, exclude=tuple(chance.sample(forms, k=chance.randint(0, 5))))
        assert split_counts(folder) == {"train": _left_by_energon(folder)}, excluded(folder)


def test_half_of_the_samples_excluded_halves_the_count(tmp_path: Path) -> None:
    assert split_counts(made(tmp_path, "a.tar", exclude=("a.tar/s{0..2}",))) == {"train": SHARD // 2}


def test_an_excluded_shard_is_of_no_split(tmp_path: Path) -> None:
    assert split_shards(made(tmp_path, "a.tar", "b.tar", exclude=("b.tar",))) == {"train": ["a.tar"]}


def test_what_energon_cannot_read_of_exclude_is_a_fault_of_the_metadata(tmp_path: Path) -> None:
    assert not list(faults(made(tmp_path / "right", "a.tar")))
    assert "has no exclude that Energon could read" in next(faults(made(tmp_path / "wrong", "a.tar", exclude="a.tar")))


def test_a_stream_whose_samples_are_all_excluded_is_counted(tmp_path: Path) -> None:
    """Streams are dealt out in rows: what Energon deals each is looked through for one that is left."""
    chance = random.Random(9)
    for number in range(30):
        gone = tuple(f"a.tar/s{index}" for index in chance.sample(range(SHARD), k=chance.randint(1, 5)))
        folder = made(tmp_path / str(number), "a.tar", "b.tar", exclude=gone)
        streams = chance.choice([2, 3, 4, 5])
        meta = WebdatasetMeta.from_config(EPath(str(folder)), split_part="train")
        names = [f"{shard.name}/s{index}" for shard in meta.shards for index in range(shard.count)]
        empty = 0
        for rank in range(streams):
            own = WorkerConfig(rank=rank, world_size=streams, num_workers=0)
            first, last = Sharder.split_samples_to_workers(0, len(names), own, rotation_offset=0)
            empty += all(name in meta.sample_excludes for name in names[first:last])
        found = streams_without_sample(folder, "train", streams)
        assert found <= empty
        if len(names) % streams == 0:  # else which row is longer is Energon's own choice
            assert found == empty


def test_shards_in_linked_folders_and_linked_shards_are_there(tmp_path: Path) -> None:
    elsewhere = made(tmp_path / "elsewhere", "part/a.tar", "b.tar")
    folder = made(tmp_path / "data", "own.tar")
    (folder / "part").symlink_to(elsewhere / "part")
    (folder / "c.tar").symlink_to(elsewhere / "b.tar")
    (folder / "again").symlink_to(folder)  # a circle

    assert shards_there(folder) == {"own.tar", "part/a.tar", "c.tar"}


def test_a_shard_that_the_metadata_names_by_a_second_way_is_there(tmp_path: Path) -> None:
    elsewhere = made(tmp_path / "elsewhere", "a.tar")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one").symlink_to(elsewhere)
    (folder / "two").symlink_to(elsewhere)
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta" / "split.yaml").write_text("split_parts: {train: [one/a.tar, two/a.tar, gone.tar]}")

    assert shards_there(folder) == {"one/a.tar", "two/a.tar"}
