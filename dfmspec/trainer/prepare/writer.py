"""Writes a WebDataset with Energon's metadata: pictures and captions encoded, dealt out into shards, put in place."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import numpy as np
import torch

from dfmspec.data.encoders import EMBEDDED_PICTURES, EMBEDDED_TEXTS
from dfmspec.data.upgrade import upgrade
from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.encoders import PictureEncoder, TextEncoder, picture_encoder, text_encoder
from dfmspec.trainer.prepare.sources import Picture, embedded_pictures

SHARDS = 8
"""Tar files of a dataset."""
_SPLIT = (("train", 6.0), ("val", 1.0), ("test", 1.0))
"""Shards of each split: Energon splits by shard."""


def write_dataset(pictures: Iterator[Picture], out: Path, *, count: int) -> None:
    """Encode pictures into shards with Energon's metadata, in a folder beside `out`, and rename it into place.

    Raises:
        DataError: `out` exists.
        OSError: the disk; nothing is left behind.
    """
    if out.exists():
        raise DataError(f"{out} exists; nothing was written. Choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    aside = out.with_name(f".{out.name}.tmp-{unique}")
    aside.mkdir()
    try:
        names = _write_shards(pictures, aside, count)
        write_metadata(aside, names)
        try:
            os.rename(aside, out)
        except OSError:
            # Another process may have prepared the same dataset meanwhile.
            if not (out / ".nv-meta").is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shards(pictures: Iterator[Picture], folder: Path, count: int) -> list[str]:
    """The tar files, samples dealt out in turn; returns their names."""
    codec = picture_encoder(EMBEDDED_PICTURES)
    text = text_encoder(EMBEDDED_TEXTS)
    names = [f"rank0-{index:06d}.tar" for index in range(SHARDS)]  # as the how-to has them
    with ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(folder / name, "w")) for name in names]
        for index, picture in enumerate(pictures):
            files = _encoded(picture, codec, text)
            _add(tars[index % SHARDS], picture.key, files)
            done = index + 1
            if done % 512 == 0:
                print(f"  {done} of {count} samples", file=sys.stderr, flush=True)
    return names


def _encoded(picture: Picture, codec: PictureEncoder, text: TextEncoder) -> dict[str, bytes]:
    """The files of a sample, by suffix: latent, text embedding and description."""
    frames = torch.from_numpy(np.array(picture.image))[None]  # [1, H, W, 3]
    latent = codec.encode(frames)[None]  # [1, 16, 1, H/8, W/8]
    embedding = text.encode(picture.caption)  # [L, E]
    description = {
        "caption": picture.caption,
        "width": picture.image.width,
        "height": picture.image.height,
        "num_frames": 1,
    }
    return {
        "pth": _saved(latent.to(torch.bfloat16)),
        "pickle": pickle.dumps(embedding.to(torch.bfloat16)),
        "json": json.dumps(description).encode(),
    }


def _add(tar: tarfile.TarFile, key: str, files: dict[str, bytes]) -> None:
    """Append a sample to a shard."""
    for suffix, data in files.items():
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _saved(tensor: torch.Tensor) -> bytes:
    """The bytes of torch.save's file."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def write_metadata(folder: Path, names: list[str]) -> None:
    """Write what `energon prepare --sample-type CrudeWebdataset` does: counts, index, split and dataset class.

    The counts are also written as Energon 6 has them, which NVIDIA DFM reads.

    `names` are the shards in `folder`.
    """
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    with redirect_stdout(io.StringIO()):  # Energon's own progress
        found, *_ = WebdatasetPreparator.prepare_dataset(
            EPath(str(folder.absolute())),
            names,
            split_parts_ratio=list(_SPLIT),
            shuffle_seed=None,
            workers=1,
        )
    assert found, "Energon found no samples in shards that were just written"
    dataset_class = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (folder / ".nv-meta" / "dataset.yaml").write_text(dataset_class)
    upgrade(folder)


def ensure_dataset(experiment: Experiment) -> None:
    """Draw the embedded data when the spec asks for it and it is not there yet."""
    data = experiment.data
    path = experiment.dataset.path
    if data.source != "embedded" or not path or Path(path).exists():
        return
    print(f"[INFO] Drawing {data.num_samples} embedded samples at {data.resolution} px into {path}", flush=True)
    pictures = embedded_pictures(data.resolution, data.num_samples, data.seed)
    write_dataset(pictures, Path(path), count=data.num_samples)
