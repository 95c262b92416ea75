"""Writes the weights of a checkpoint as one safetensors file: `dfmspec export`.

usage: python -m dfmspec.trainer.commands.export CHECKPOINT OUT [--names dfmspec|dfm] [--raw]
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dfmspec.processes import unwind_on_sigterm
from dfmspec.record.locate import locate
from dfmspec.trainer.ending import ended, say
from dfmspec.trainer.inference import load_model, one_process
from dfmspec.trainer.network.weights import DFMS_ORDER, POSITIONS, to_dfm


def main(argv: list[str] | None = None) -> int:
    """Write the weights of a checkpoint, put together from all of its shards; the exit code is 1 when there is none.

    The file has the checkpoint's iteration and digest in its metadata.
    """
    args = _parser().parse_args(argv)
    logging.disable(logging.WARNING)
    return ended(partial(_export, args), args.out)


def _export(args: argparse.Namespace) -> int:
    checkpoint, manifest = locate(args.checkpoint, say)
    experiment = one_process(manifest["config"])
    model = load_model(checkpoint, experiment, raw=args.raw)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    facts = {
        "iteration": str(manifest["iteration"]),
        "weights": "trained" if args.raw else "averaged",
        "config_digest": manifest["config_digest"],
    }
    if args.names == "dfm":
        weights = to_dfm(weights)
        facts[POSITIONS] = DFMS_ORDER
    _write(weights, args.out, facts)
    print(args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dfmspec.trainer.commands.export")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--names", choices=["dfmspec", "dfm"], default="dfmspec")
    parser.add_argument("--raw", action="store_true")
    return parser


def _write(weights: dict[str, Tensor], out: Path, facts: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    unique = secrets.token_hex(8)
    aside = out.with_name(f".{out.name}.{unique}.tmp")
    try:
        save_file(weights, aside, metadata=facts)
        aside.rename(out)
    except SafetensorError as error:
        raise OSError(f"{out} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    unwind_on_sigterm()
    sys.exit(main())
