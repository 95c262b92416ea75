"""Makes a WebDataset with Energon metadata: `dfmspec data prepare`.

usage: python -m dfmspec.trainer.prepare OUT --resolution 64 --num-samples 2048 --seed 0 [--images FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from dfmspec.errors import DataError
from dfmspec.processes import unwinding
from dfmspec.trainer.ending import ended
from dfmspec.trainer.prepare.sources import embedded_pictures, folder_pictures
from dfmspec.trainer.prepare.writer import SHARDS, write_dataset


def main(argv: list[str] | None = None) -> int:
    """Write a dataset; the exit code is 1 when it cannot be."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(1)
    return ended(partial(_prepare, args), args.path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dfmspec.trainer.prepare")
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _prepare(args: argparse.Namespace) -> int:
    """Encode the pictures of a folder, or else embedded ones, into a new dataset; prints its folder.

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
    print(args.path)
    return 0


if __name__ == "__main__":
    sys.exit(unwinding(main))
