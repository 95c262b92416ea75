"""Writes a WebDataset with Energon's metadata: pictures and captions, encoded, dealt out into shards, renamed into place."""

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

from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.encoders.ngram import NgramTextEncoder
from dfmspec.trainer.prepare.sources import Picture, embedded_pictures

SHARDS = 8


_SPLIT = (("train", 6.0), ("val", 1.0), ("test", 1.0))  # Energon splits by shard


def write_dataset(pictures: Iterator[Picture], out: Path, *, count: int) -> None:
    """Encode pictures into shards with Energon's metadata, in a folder beside `out`, and rename it into place.

    Raises:
        DataError: `out` exists.
    """
    if out.exists():
        raise DataError(f"{out} exists; nothing was written. Choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        write_metadata(aside, _write_shards(pictures, aside, count))
        try:
            os.rename(aside, out)
        except OSError:
            if not (out / ".nv-meta").is_dir():  # else another process prepared the same dataset meanwhile
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_shards(pictures: Iterator[Picture], folder: Path, count: int) -> list[str]:
    """The tar files, samples dealt out in turn; returns their names."""
    codec, text = DctCodec(), NgramTextEncoder()
    names = [f"rank0-{index:06d}.tar" for index in range(SHARDS)]  # as the how-to has them
    with ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(folder / name, "w")) for name in names]
        for index, picture in enumerate(pictures):
            frames = torch.from_numpy(np.array(picture.image))[None]  # [1, H, W, 3]
            latent = codec.encode(frames)[None].to(torch.bfloat16)  # [1, 16, 1, H/8, W/8]
            description = {"caption": picture.caption, "width": picture.image.width, "height": picture.image.height, "num_frames": 1}
            parts = {
                "pth": _saved(latent),
                "pickle": pickle.dumps(text.encode(picture.caption).to(torch.bfloat16)),
                "json": json.dumps(description).encode(),
            }
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{picture.key}.{suffix}")
                info.size = len(data)
                tars[index % len(tars)].addfile(info, io.BytesIO(data))
            if (index + 1) % 512 == 0:
                print(f"  {index + 1} of {count} samples", file=sys.stderr, flush=True)
    return names


def _saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def write_metadata(folder: Path, names: list[str]) -> None:
    """What `energon prepare --sample-type CrudeWebdataset` writes: counts, index, split and dataset class."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    with redirect_stdout(io.StringIO()):  # Energon's own progress
        found, *_ = WebdatasetPreparator.prepare_dataset(EPath(str(folder.absolute())), names, split_parts_ratio=list(_SPLIT), shuffle_seed=None, workers=1)
    assert found, "Energon found no samples in shards that were just written"
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def ensure_dataset(experiment: Experiment) -> None:
    """Draw the embedded data when the spec asks for it and it is not there yet."""
    data, path = experiment.data, experiment.dataset.path
    if data.source == "embedded" and path and not Path(path).exists():
        print(f"[INFO] Drawing {data.num_samples} embedded samples at {data.resolution} px into {path}", flush=True)
        write_dataset(embedded_pictures(data.resolution, data.num_samples, data.seed), Path(path), count=data.num_samples)
