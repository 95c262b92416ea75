"""Writes the weights of a checkpoint as one safetensors file, or as a checkpoint of NVIDIA DFM's: `dfmspec export`.

usage: python -m dfmspec.trainer.commands.export CHECKPOINT OUT [--names dfmspec|dfm] [--for dfm] [--raw]
"""

from __future__ import annotations

import argparse
import logging
import secrets
import shutil
import sys
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dfmspec.processes import unwinding
from dfmspec.record.locate import locate
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.ending import ended, say
from dfmspec.trainer.inference import load_model, one_process
from dfmspec.trainer.network.bridge_writer import write_bridge_checkpoint
from dfmspec.trainer.network.weights import DFMS_ORDER, POSITIONS, to_dfm


def main(argv: list[str] | None = None) -> int:
    """Write the weights of a checkpoint, put together from all of its shards; the exit code is 1 when there is none.

    A file has the checkpoint's iteration and digest in its metadata.
    """
    args = _parser().parse_args(argv)
    logging.disable(logging.WARNING)
    return ended(partial(_export, args), args.out)


def _export(args: argparse.Namespace) -> int:
    checkpoint = locate(args.checkpoint, say)
    experiment = one_process(checkpoint.config)
    model = load_model(checkpoint, experiment, raw=args.raw)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    if args.program == "dfm":
        _write_for_dfm(to_dfm(weights), args.out, experiment, checkpoint.iteration)
    else:
        facts = {
            "iteration": str(checkpoint.iteration),
            "weights": "averaged" if checkpoint.is_own and not args.raw else "trained",
            "config_digest": checkpoint.config_digest,
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
    parser.add_argument("--for", dest="program", choices=["dfm"])
    parser.add_argument("--raw", action="store_true")
    return parser


def _write_for_dfm(weights: dict[str, Tensor], out: Path, experiment: Experiment, iteration: int) -> None:
    """Write a folder of checkpoints, whole or not at all.

    Raises:
        CheckpointError: DFM has no such network.
        OSError: it cannot be written.
    """
    unique = secrets.token_hex(8)
    aside = out.with_name(f".{out.name}.{unique}.tmp")
    try:
        write_bridge_checkpoint(aside, weights, experiment, iteration)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(
        f"weights without an optimizer's state: DFM trains on from them, from iteration 0 and with a new optimizer, "
        f"by checkpoint.pretrained_checkpoint={out}"
    )


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
    sys.exit(unwinding(main))
