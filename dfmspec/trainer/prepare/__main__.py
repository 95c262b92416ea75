"""Writes and inspects WebDatasets with Energon metadata: `dfmspec data prepare` and `dfmspec data inspect`.

usage: python -m dfmspec.trainer.prepare OUT --resolution 64 --num-samples 2048 --seed 0 [--images FOLDER]
       python -m dfmspec.trainer.prepare --inspect PATH
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dfmspec.data.energon_metadata import split_counts
from dfmspec.data.shards import SAMPLE_NAME
from dfmspec.errors import DataError
from dfmspec.processes import unwind_on_sigterm
from dfmspec.trainer.data.decode import load_context, load_latent
from dfmspec.trainer.prepare.sources import embedded_pictures, folder_pictures
from dfmspec.trainer.prepare.writer import SHARDS, write_dataset


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
    """Write or inspect a dataset; the exit code is 1 when there are problems."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.inspect:
            found = inspect(args.path)
            print(json.dumps(found, indent=2))
            return 1 if found["problems"] else 0
        _prepare(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dfmspec.trainer.prepare")
    parser.add_argument("path", type=Path)
    parser.add_argument("--inspect", action="store_true")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _prepare(args: argparse.Namespace) -> None:
    """Encode the pictures of a folder, or else embedded ones, into a new dataset.

    Raises:
        DataError: the pictures cannot be read or are too few, or the dataset exists.
    """
    if args.images:
        found = list(folder_pictures(args.images, args.resolution))
        count = len(found)
        pictures = iter(found)
        if count < SHARDS:
            raise DataError(f"{args.images} has {count} pictures; give at least {SHARDS}, so that each split has one")
    else:
        count = args.num_samples
        pictures = embedded_pictures(args.resolution, count, args.seed)
    print(
        f"Drawing and encoding {count} samples at {args.resolution} px into {args.path}",
        file=sys.stderr,
        flush=True,
    )
    write_dataset(pictures, args.path, count=count)


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
