"""Safe decoding, packing, noise, embedded data, and what Energon reads."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfmspec.entry import _parser, _resolve
from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.targets import target_module
from dfmspec.trainer.data.decode import load_context, load_latent
from dfmspec.trainer.data.microbatch import _padded
from dfmspec.trainer.data.patches import num_tokens, patch_positions, patchify, unpatchify
from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.encoders.ngram import NgramTextEncoder
from dfmspec.trainer.noise import draw as draw_noise
from dfmspec.trainer.prepare.butterflies import BACKGROUNDS, COLOURS, butterfly, draw
from tests.conftest import TINY, dfmspec, environment


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Attack:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/dfmspec-was-here",)


def experiment(dataset: Path, *overrides: str) -> Experiment:
    """The resolved configuration of the smallest model on a dataset."""
    args = _parser().parse_args(["--dataset-path", str(dataset), *TINY, *overrides])
    resolved = _resolve(args)
    return Experiment.model_validate(json.loads(json.dumps(target_module("megatron_core").config(resolved.values))))


@pytest.mark.parametrize("value", [torch.randn(1, 16, 1, 8, 8), torch.randn(16, 2, 4, 4).bfloat16()])
def test_a_latent_is_read_with_or_without_its_batch_axis(value: torch.Tensor) -> None:
    assert load_latent(saved(value)).dim() == 4


@pytest.mark.parametrize(
    "value", [torch.randn(12, 1024), torch.randn(1, 5, 1024).bfloat16(), np.ones((3, 4), dtype=np.float32)]
)
def test_a_text_embedding_is_read_from_plain_pickles_of_tensors_and_arrays(value: object) -> None:
    assert load_context(pickle.dumps(value)).dim() == 2


@pytest.mark.parametrize(
    "data",
    [pickle.dumps(Attack()), pickle.dumps({"a": Attack()}), pickle.dumps(eval), b"", b"\x80\x04", b"not a pickle"],
)
def test_a_pickle_never_runs_code(data: bytes) -> None:
    with pytest.raises(DataError, match=r"wants to run|cannot be read"):
        load_context(data)
    with pytest.raises(DataError):
        load_latent(saved(Attack()))

    assert not Path("/tmp/dfmspec-was-here").exists()


@pytest.mark.parametrize(
    "value", [torch.randn(3, 3), torch.full((16, 1, 2, 2), torch.nan), "text", torch.randn(2, 16, 1, 2, 2)]
)
def test_a_latent_that_cannot_be_used_says_why(value: object) -> None:
    with pytest.raises(DataError, match=r"axes|finite|not a tensor|shape|cannot be read"):
        load_latent(saved(value))


@given(st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_patching_is_undone_exactly(pt: int, p: int, t: int, h: int, w: int) -> None:
    latent = torch.randn(3, t * pt, h * p, w * p)
    tokens = patchify(latent, pt, p)

    assert len(tokens) == num_tokens(latent.shape, pt, p) == len(patch_positions(latent.shape, pt, p))
    assert torch.equal(unpatchify(tokens, tuple(latent.shape), pt, p), latent)


def test_noise_depends_on_its_counters_alone() -> None:
    common = {"seed": 1, "split": "train", "p_mean": 0.0, "p_std": 1.0, "dropout": 0.2}
    first = draw_noise((2, 1, 4, 4), stream=0, ordinal=5, **common)
    torch.manual_seed(99)
    again, other = (
        draw_noise((2, 1, 4, 4), stream=0, ordinal=5, **common),
        draw_noise((2, 1, 4, 4), stream=1, ordinal=5, **common),
    )

    assert torch.equal(first.noise, again.noise)
    assert first.sigma == again.sigma
    assert not torch.equal(first.noise, other.noise)


def test_noise_has_the_distribution_that_the_spec_asks_for() -> None:
    draws = [
        draw_noise((1, 1, 1, 1), seed=0, split="train", stream=0, ordinal=i, p_mean=-1.2, p_std=1.2, dropout=0.2)
        for i in range(4000)
    ]
    logs = torch.tensor([one.sigma for one in draws]).log()

    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.06)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.05)
    assert sum(not one.keep_condition for one in draws) / 4000 == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_butterflies_show_what_their_captions_say(resolution: int) -> None:
    """The wings' colour and the background's are those of the caption; the same seed draws the same picture."""
    for index in range(6):
        subject = butterfly(7, index)
        pixels = np.array(draw(subject, resolution)).astype(float)
        corner = pixels[: resolution // 16, : resolution // 16].mean(axis=(0, 1))
        named = {name: np.linalg.norm(corner - np.array(colour)) for name, colour in BACKGROUNDS.items()}
        assert min(named, key=named.__getitem__) == subject.background
        assert np.array_equal(pixels, np.array(draw(subject, resolution)).astype(float))
        distance = np.linalg.norm(pixels - np.array(COLOURS[subject.colour]), axis=-1)
        assert (distance < 60).mean() > 0.05, subject.caption


def test_the_codec_keeps_pictures_recognisable_and_latents_of_unit_variance() -> None:
    codec = DctCodec()
    frames = torch.stack([torch.from_numpy(np.array(draw(butterfly(3, index), 128))) for index in range(24)])
    latents = codec.encode(frames)
    error = (codec.decode(latents).float() - frames.float()).square().mean()
    psnr = 10 * torch.log10(255**2 / error)

    assert latents.shape == (16, 24, 16, 16)
    assert float(latents.std()) == pytest.approx(1.0, abs=0.1)
    assert float(psnr) > 22


def test_text_embeddings_are_near_when_the_words_are() -> None:
    encode = NgramTextEncoder().encode
    orange, oranges, blue = (encode(word)[0] for word in ("orange", "oranges", "blue"))
    near = torch.nn.functional.cosine_similarity(orange, oranges, dim=0)

    assert encode("a b c").shape == (12, 1024)
    assert float(near) > 0.5 > float(torch.nn.functional.cosine_similarity(orange, blue, dim=0))
    assert float(orange.std()) == pytest.approx(1.0, abs=0.1)


def test_the_metadata_is_what_energons_own_command_writes(dataset: Path, tmp_path: Path) -> None:
    """`energon prepare` on the same shards gives the same counts, split and dataset class."""
    for shard in dataset.glob("*.tar"):
        shutil.copy(shard, tmp_path)
    energon = str(Path(sys.executable).with_name("energon"))
    command = [
        energon,
        "prepare",
        "--non-interactive",
        "--split-ratio",
        "6,1,1",
        "--sample-type",
        "CrudeWebdataset",
        str(tmp_path),
    ]
    subprocess.run(command, capture_output=True, timeout=120, check=True)

    for name in (".info.json", "split.yaml", "dataset.yaml"):
        assert (dataset / ".nv-meta" / name).read_text() == (tmp_path / ".nv-meta" / name).read_text()


def test_every_sample_comes_once_an_epoch_over_all_streams(dataset: Path) -> None:
    from dfmspec.trainer.data.streams import RankStreams

    config = experiment(
        dataset,
        "data.num_streams=4",
        "dataset.task_encoder_seq_length=16",
        "dataset.shuffle_buffer_size=1",
        "dataset.packing_buffer_size=1",
    )
    packs = RankStreams(config, "train", rank=0, size=1)
    keys = [sample.key for _ in range(96) for sample in next(packs)]

    assert len(keys) == 96
    assert len(set(keys)) == 96


def test_the_order_belongs_to_streams_and_not_to_ranks(dataset: Path) -> None:
    """One rank, or two ranks taking turns, or a resumed pair: the same packs in the same order with the same noise."""
    from dfmspec.trainer.data.streams import RankStreams

    config = experiment(dataset, "data.num_streams=4", "dataset.task_encoder_seq_length=64")
    one = RankStreams(config, "train", rank=0, size=1)
    ledger = [[(sample.key, sample.draw.sigma) for sample in next(one)] for _ in range(24)]

    pair = [RankStreams(config, "train", rank=rank, size=2) for rank in (0, 1)]
    seen = [[(sample.key, sample.draw.sigma) for sample in next(pair[i % 2])] for i in range(10)]
    states = {index: stream.state() for side in pair for index, stream in side.streams.items()}
    resumed = RankStreams(config, "train", rank=0, size=1, consumed=10)
    for index, stream in resumed.streams.items():
        stream.restore(states[index])
    seen += [[(sample.key, sample.draw.sigma) for sample in next(resumed)] for _ in range(14)]

    assert seen == ledger


def broken_copy(dataset: Path, folder: Path, part: str, data: bytes) -> Path:
    """The dataset with one file of one training sample replaced, prepared again."""
    copy = folder / "broken"
    copy.mkdir()
    for shard in sorted(dataset.glob("*.tar")):
        with tarfile.open(shard) as source, tarfile.open(copy / shard.name, "w") as out:
            for i, member in enumerate(source):
                content = source.extractfile(member).read()  # type: ignore[union-attr]
                if i < 3 and member.name.endswith(part):
                    content = data
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    from dfmspec.trainer.prepare.writer import write_metadata

    write_metadata(copy, sorted(path.name for path in copy.glob("*.tar")))
    return copy


@pytest.mark.parametrize("workers", [0, 1])
def test_a_hostile_sample_stops_the_reader_with_key_and_shard(workers: int, dataset: Path, tmp_path: Path) -> None:
    from dfmspec.trainer.data.streams import RankStreams

    copy = broken_copy(dataset, tmp_path, ".pickle", pickle.dumps(Attack()))
    config = experiment(copy, "data.num_streams=1", f"dataset.num_workers={workers}")
    with pytest.raises(
        DataError, match=r"^sample .*butterfly-.* of .*rank0-.*\.tar: its \.pickle wants to run posix\.system"
    ):
        for _ in range(40):
            next(RankStreams(config, "train", rank=0, size=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_shard_stops_the_reader_with_a_way_out(workers: int, dataset: Path, tmp_path: Path) -> None:
    from dfmspec.trainer.data.streams import RankStreams

    copy = tmp_path / "truncated"
    shutil.copytree(dataset, copy)
    for shard in copy.glob("*.tar"):
        os.truncate(shard, 20_000)
    packs = RankStreams(
        experiment(copy, "data.num_streams=1", f"dataset.num_workers={workers}"), "train", rank=0, size=1
    )

    with pytest.raises(
        DataError,
        match=r"split train of .*truncated cannot be read: .*unexpected end of data; dfmspec validate --check data",
    ):
        for _ in range(60):
            next(packs)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=20),
    st.integers(0, 300),
    st.sampled_from([1, 2, 16, 32]),
)
def test_padding_is_cut_like_the_longest_sample(lengths: list[tuple[int, int]], left: int, multiple: int) -> None:
    counts, texts = [list(each) for each in zip(*lengths, strict=True)]
    total = sum(counts) + left
    padded, keys, sigmas = _padded(counts, texts, [2.0] * len(counts), total, multiple)

    assert (padded[: len(counts)], keys[: len(counts)]) == (counts, texts)
    assert sum(padded) == total
    assert max(padded) == max(counts)
    assert sum(keys) % multiple == 0
    assert sum(keys) <= 9 / 8 * (sum(texts) + len(padded)) + 2 * multiple
    assert all(key for count, key in list(zip(padded, keys, strict=True))[len(counts) :] if count)
    assert len(padded) == len(keys) == len(sigmas)
    assert sigmas == [2.0] * len(counts) + [1.0] * (len(padded) - len(counts))


def test_data_inspect_reports_a_truncated_shard_and_a_hostile_pickle(dataset: Path, tmp_path: Path) -> None:
    copy = broken_copy(dataset, tmp_path, ".pickle", pickle.dumps(Attack()))
    shard = sorted(copy.glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    result = dfmspec("data", "inspect", copy)
    found = json.loads(result.stdout)

    assert result.returncode == 1
    assert any("wants to run" in problem and "butterfly-" in problem for problem in found["problems"])
    assert any(str(shard) in problem for problem in found["problems"])
    assert not Path("/tmp/dfmspec-was-here").exists()


def test_data_inspect_is_content_with_what_data_prepare_made(dataset: Path) -> None:
    result = dfmspec("data", "inspect", dataset)
    found = json.loads(result.stdout)

    assert result.returncode == 0, found["problems"]
    assert found["samples"] == {"train": 96, "val": 16, "test": 16}
    assert found["latent_shapes"] == {"[16, 1, 8, 8]": 64}
    assert found["latent_std"] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(("count", "until"), [(1000000, "*.tar"), (1024, ".nv-meta")])
def test_ctrl_c_leaves_nothing_half_made_and_no_traceback(count: int, until: str, tmp_path: Path) -> None:
    """While it draws, and while Energon's processes make the index."""
    command = [sys.executable, "-m", "dfmspec", "data", "prepare", str(tmp_path / "out"), "--num-samples", str(count)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(f".out.*/{until}")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert [line for line in said.splitlines() if " of 1024 samples" not in line] == [
        f"Drawing and encoding {count} samples at 64 px into {tmp_path / 'out'}"
    ]
    assert not any(tmp_path.glob(".out.*"))
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_data_prepare_takes_a_folder_of_pictures_and_never_overwrites(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(8):
        draw(butterfly(1, index), 128).save(pictures / f"picture_{index}.png")
    (pictures / "picture_0.txt").write_text("a caption of its own")
    made = dfmspec("data", "prepare", tmp_path / "out", "--images", pictures)
    again = dfmspec("data", "prepare", tmp_path / "out", "--images", pictures)

    assert made.returncode == 0, made.stderr
    assert again.returncode == 1
    assert "exists; nothing was written" in again.stderr
    assert json.loads(dfmspec("data", "inspect", tmp_path / "out").stdout)["problems"] == []
    shutil.rmtree(tmp_path / "out")
