"""A shard as Energon walks it."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from dfmspec.data.inspection import inspect
from dfmspec.data.shards import scan
from tests.data.faulty import CONTAINERS, LATENT, TEXT

FILES = {
    "pth": CONTAINERS["zip"](torch.randn(LATENT)),
    "pickle": pickle.dumps(torch.randn(TEXT)),
    "json": b"{}",
}


def written(shard: Path, *names: str, files: dict[str, bytes] = FILES, mode: str = "w") -> Path:
    """A shard with these files, in this order."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, mode) as tar:  # type: ignore[call-overload]
        for name in names:
            data = files.get(name.rpartition(".")[2], b"")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return shard


def whole(*keys: str) -> list[str]:
    """The files of some samples, in their order."""
    return [f"{key}.{part}" for key in keys for part in FILES]


def test_parts_that_are_not_next_to_one_another_are_named_with_key_and_shard(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", *whole("0"), *[f"{key}.{part}" for part in FILES for key in ("a", "b")])
    found = scan(tmp_path)

    assert found.apart == {"a.tar": ("a", "b")}
    assert [sample.place for sample in found.samples] == ["0 of a.tar"]
    assert found.counts == {tmp_path / "a.tar": 7}  # as Energon counts
    told = [problem for problem in inspect(tmp_path)["problems"] if "not next to" in problem]
    assert told == [
        f"{tmp_path}/a.tar: of 2 samples, first a: its parts are not next to one another in the shard; "
        "write the tar sorted by name"
    ]


def test_parts_that_are_apart_beyond_the_samples_that_are_read_are_found(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", *whole(*"012345"), "a.pth", "b.pth", "a.pickle")

    assert scan(tmp_path, limit=2).apart == {"a.tar": ("a",)}


def test_a_name_that_comes_again_with_all_parts_is_another_sample(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", *whole("a", "b", "a"))

    assert scan(tmp_path).apart == {}


def test_names_that_energon_passes_over_are_no_samples(tmp_path: Path) -> None:
    shard = written(tmp_path / "a.tar", "__meta__/x.json", *whole("a"), "README")

    assert scan(tmp_path).counts == {shard: 1}


def test_a_compressed_shard_is_broken_as_it_is_for_energon(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", *whole("a"), mode="w:gz")

    assert len(scan(tmp_path).broken) == 1


def test_a_damaged_sample_in_a_linked_folder_is_found(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere" / "a.tar", "a.pth", "a.pickle")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part0").symlink_to("../elsewhere")
    samples = scan(tmp_path / "data").samples

    assert [sample.problem for sample in samples] == [
        "it has no .json file; a sample is .pth, .pickle and .json under one name"
    ]
    assert samples[0].place == "a of part0/a.tar"


def test_what_is_excluded_is_not_looked_at(tmp_path: Path) -> None:
    written(tmp_path / "a.tar", *whole("a"), "bad.pth", *whole("b"))
    shutil.copy(written(tmp_path / "bad.tar", "x.pth"), tmp_path / "worse.tar")
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / "split.yaml").write_text(
        "split_parts: {train: [a.tar]}\nexclude: ['{bad,worse}.tar', a.tar/bad]\n"
    )
    found = scan(tmp_path)

    assert [sample.place for sample in found.samples] == ["a of a.tar", "b of a.tar"]
    assert found.counts == {tmp_path / "a.tar": 3}  # Energon counts what it passes over


@pytest.mark.parametrize("tokens", [512, 513])
def test_a_text_longer_than_any_of_t5_is_told(tokens: int, tmp_path: Path) -> None:
    long = {**FILES, "pickle": pickle.dumps(torch.randn(tokens, 8))}
    written(tmp_path / "a.tar", *whole("a"), files=long)

    assert any(f"texts have up to {tokens} tokens" in problem for problem in inspect(tmp_path)["problems"]) == (
        tokens > 512
    )
