"""Writes and inspects WebDatasets with Energon metadata: `dfmspec data prepare` and `dfmspec data inspect`.

usage: python -m dfmspec.trainer.prepare OUT --resolution 64 --num-samples 2048 --seed 0 [--images FOLDER]
       python -m dfmspec.trainer.prepare --inspect PATH
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfmspec.data.energon_metadata import split_counts
from dfmspec.data.shards import SAMPLE_NAME
from dfmspec.errors import DataError
from dfmspec.processes import unwind_on_sigterm
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.decode import load_context, load_latent
from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.encoders.ngram import NgramTextEncoder
from dfmspec.trainer.prepare.butterflies import butterfly, draw

_SHARDS = 8
_SPLIT = (("train", 6.0), ("val", 1.0), ("test", 1.0))  # Energon splits by shard


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows."""

    key: str
    image: Image.Image
    caption: str


def embedded_pictures(resolution: int, num_samples: int, seed: int) -> Iterator[Picture]:
    """dfmspec's own butterflies."""
    for index in range(num_samples):
        subject = butterfly(seed, index)
        yield Picture(f"butterfly-{index:07d}", draw(subject, resolution), subject.caption)


def folder_pictures(folder: Path, resolution: int) -> Iterator[Picture]:
    """A folder's pictures, cropped square; the caption is the .txt file of the same name, else the file's name."""
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not names:
        raise DataError(f"{folder} has no .png, .jpg or .webp files")
    for path in names:
        text = path.with_suffix(".txt")
        caption = text.read_text(errors="replace").strip() if text.exists() else path.stem.replace("_", " ").replace("-", " ")
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise DataError(f"picture {path} cannot be read: {error}") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        yield Picture(path.name.replace(".", "_"), square.resize((resolution, resolution), Image.Resampling.LANCZOS), caption)


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
    names = [f"rank0-{index:06d}.tar" for index in range(_SHARDS)]  # as the how-to has them
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


def inspect(path: Path, limit: int = 64) -> dict[str, Any]:
    """Read the first samples of every shard, as the trainer would, without running their code.

    Returns: shards, samples by split, latent shapes, text lengths, and the latents' mean and standard deviation, with
    the problems found (each names sample and shard).
    """
    shards = sorted(path.glob("*.tar"))
    problems: list[str] = []
    if not (path / ".nv-meta").is_dir():
        problems.append(f"{path} has no .nv-meta; run: energon prepare --sample-type CrudeWebdataset {path}")
    shapes: dict[str, int] = {}
    values: list[torch.Tensor] = []
    lengths: list[int] = []
    for shard in shards:
        for key, parts in _first_samples(shard, max(1, limit // len(shards)), problems):
            try:
                for part in ("pth", "pickle", "json"):
                    if part not in parts:
                        raise DataError(f"it has no .{part} file")
                latent, context = load_latent(parts["pth"]), load_context(parts["pickle"])
            except DataError as error:
                problems.append(f"sample {key} of {shard}: {error}")
                continue
            shapes[str(list(latent.shape))] = shapes.get(str(list(latent.shape)), 0) + 1
            values.append(latent.float().flatten())
            lengths.append(len(context))
    everything = torch.cat(values) if values else torch.zeros(1)
    std = float(everything.std()) if values else None
    if std is not None and not 0.7 <= std <= 1.4:
        problems.append(f"latents have standard deviation {std:.3f}; the trainer expects about 1 and multiplies by sigma_data")
    return {
        "path": str(path), "shards": len(shards), "samples": split_counts(path) or {}, "read": len(values), "latent_shapes": shapes,
        "latent_mean": round(float(everything.mean()), 4) if values else None,
        "latent_std": round(std, 4) if std is not None else None,
        "text_tokens": [min(lengths), max(lengths)] if lengths else None, "problems": problems,
    }  # fmt: skip


def _first_samples(shard: Path, limit: int, problems: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {suffix: bytes}) of the first samples; a shard that breaks off is a problem, not a crash."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                match = SAMPLE_NAME.match(member.name) if member.isfile() else None
                if match is None or (match[1] not in samples and len(samples) == limit):
                    continue
                handle = tar.extractfile(member)
                samples.setdefault(match[1], {})[match[2]] = handle.read() if handle else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        problems.append(f"{shard} is not a whole tar file: {error}")
    yield from samples.items()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dfmspec.trainer.prepare")
    parser.add_argument("path", type=Path)
    parser.add_argument("--inspect", action="store_true")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.inspect:
            found = inspect(args.path)
            print(json.dumps(found, indent=2))
            return 1 if found["problems"] else 0
        if args.images:
            pictures = list(folder_pictures(args.images, args.resolution))
            source, count = iter(pictures), len(pictures)
            if count < _SHARDS:
                raise DataError(f"{args.images} has {count} pictures; give at least {_SHARDS}, so that each split has one")
        else:
            source, count = embedded_pictures(args.resolution, args.num_samples, args.seed), args.num_samples
        print(f"Drawing and encoding {count} samples at {args.resolution} px into {args.path}", file=sys.stderr, flush=True)
        write_dataset(source, args.path, count=count)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.path)
    return 0


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
