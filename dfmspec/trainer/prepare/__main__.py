"""Makes a WebDataset with Energon metadata: `dfmspec data prepare`.

usage: python -m dfmspec.trainer.prepare OUT --resolution 64 --num-samples 2048 --seed 0 [--images FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dfmspec.errors import DataError
from dfmspec.processes import unwind_on_sigterm
from dfmspec.trainer.prepare.sources import embedded_pictures, folder_pictures
from dfmspec.trainer.prepare.writer import SHARDS, write_dataset


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dfmspec.trainer.prepare")
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num-samples", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.images:
            pictures = list(folder_pictures(args.images, args.resolution))
            source, count = iter(pictures), len(pictures)
            if count < SHARDS:
                raise DataError(f"{args.images} has {count} pictures; give at least {SHARDS}, so that each split has one")
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
