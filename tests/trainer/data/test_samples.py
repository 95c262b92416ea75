"""What the trainer says of samples that it cannot take, and that it trains on those that it can."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path

import pytest
import torch

from dfmspec.data.inspection import inspect
from dfmspec.errors import DataError
from dfmspec.trainer.prepare.writer import write_metadata
from tests.data.faulty import CONTAINERS
from tests.trainer.data.test_data import experiment
from tests.trainer.training import losses, train

LATENT = torch.randn(16, 1, 8, 8)
TEXT = torch.randn(5, 1024)
GOOD = {"pth": CONTAINERS["zip"](LATENT), "pickle": pickle.dumps(TEXT), "json": b"{}"}


def dataset(folder: Path, files: dict[str, bytes], *, by_part: bool = False) -> Path:
    """Eight shards of four samples with these files; by part: all of one part stand before those of the next."""
    folder.mkdir()
    for shard in range(8):
        members = [(f"{shard}{index}", part) for index in range(4) for part in files]
        if by_part:
            members.sort(key=lambda member: list(files).index(member[1]))
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for key, part in members:
                info = tarfile.TarInfo(f"{key}.{part}")
                info.size = len(files[part])
                tar.addfile(info, io.BytesIO(files[part]))
    return folder


def prepared(folder: Path) -> Path:
    """A dataset with Energon's metadata."""
    write_metadata(folder, sorted(path.name for path in folder.glob("*.tar")))
    return folder


def refused(folder: Path) -> str:
    """What the trainer says when it meets a sample of a dataset."""
    from dfmspec.trainer.data.streams import RankStreams

    config = experiment(folder, "data.num_streams=1", "dataset.num_workers=0")
    with pytest.raises(DataError) as error:
        next(RankStreams(config, "train", rank=0, size=1))
    return str(error.value)


SAMPLES = {
    "no description": ({part: GOOD[part] for part in ("pth", "pickle")}, "it has no .json file"),
    "integers": (GOOD | {"pth": CONTAINERS["zip"](LATENT.int())}, "its .pth holds int32 values"),
    "sparse": (GOOD | {"pth": CONTAINERS["zip"](LATENT.to_sparse())}, "its .pth holds a sparse tensor"),
    "NaN in a text": (GOOD | {"pickle": pickle.dumps(TEXT * torch.nan)}, "its .pickle has values that are not finite"),
    "no tokens": (GOOD | {"pickle": pickle.dumps(TEXT[:0])}, "its .pickle has shape [0, 1024], which holds no numbers"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_trainer_and_data_inspect_say_the_same_of_a_sample(kind: str, tmp_path: Path) -> None:
    files, words = SAMPLES[kind]
    folder = prepared(dataset(tmp_path / "data", files))

    assert f": {words}" in refused(folder)
    assert f": {words}" in inspect(folder)["problems"][0]


def test_the_trainer_says_that_parts_are_not_next_to_one_another(tmp_path: Path) -> None:
    """By an index that counts as Energon does: it would not make one itself, for names come again."""
    folder = prepared(dataset(tmp_path / "sorted", GOOD))
    apart = dataset(tmp_path / "apart", GOOD, by_part=True)
    shutil.copytree(folder / ".nv-meta", apart / ".nv-meta")
    (apart / ".nv-meta" / ".info.json").write_text(
        json.dumps({"shard_counts": {f"{shard}.tar": 12 for shard in range(8)}})
    )
    for shard in apart.glob("*.tar"):
        with tarfile.open(shard) as tar:
            offsets = [info.offset for info in tar]
            offsets.append(tar.offset)
        shard.with_suffix(".tar.idx").write_bytes(struct.pack("<13Q", *offsets))

    assert "its parts are not next to one another in the shard; write the tar sorted by name" in refused(apart)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (GOOD | {"pth": CONTAINERS["zip"](LATENT[:4])}, "has 4 channels, and model.in_channels is 16"),
        (GOOD | {"pickle": pickle.dumps(TEXT[:, :512])}, "is 512 wide, and model.crossattn_emb_size is 1024"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_by_the_samples_name(
    files: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    folder = prepared(dataset(tmp_path / "data", files))

    said = refused(folder)
    assert said.startswith("sample ")
    assert words in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_parameters_that_were_saved_on_a_gpu_ends_well(workers: int, tmp_path: Path) -> None:
    files = GOOD | {
        "pth": CONTAINERS["zip from a GPU"](torch.nn.Parameter(LATENT)),
        "pickle": CONTAINERS["pickle from a GPU"](torch.nn.Parameter(TEXT)),
    }
    folder = prepared(dataset(tmp_path / "data", files))
    words = (f"dataset.path={folder}", f"dataset.num_workers={workers}", "train.train_iters=2", "data.num_streams=1")
    train(tmp_path / "run", *words)

    assert set(losses(tmp_path / "run")) == {1, 2}
