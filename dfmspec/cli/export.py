"""dfmspec export: a checkpoint's weights as one safetensors file, or as a checkpoint that NVIDIA DFM loads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import complete_run, named_folder, trainer_module
from dfmspec.errors import UsageError


class Names(StrEnum):
    """Whose names the tensors have."""

    dfmspec = "dfmspec"
    dfm = "dfm"


class Program(StrEnum):
    """Which program is to load them."""

    dfm = "dfm"


_Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="An iter_N folder, a folder of checkpoints, a run directory, or a run by its name or id.",
        autocompletion=complete_run,
    ),
]
_Out = Annotated[
    Path,
    typer.Option("--out", "-o", help="The file to write, or with --for the folder; it must not exist."),
]
_Names = Annotated[
    Names | None,
    typer.Option(help="Names of the tensors in a file: dfmspec's, or those of NVIDIA DFM's DiT.  [default: dfmspec]"),
]
_For = Annotated[
    Program | None,
    typer.Option("--for", help="Write a folder with a checkpoint that this program loads, instead of a file."),
]
_Raw = Annotated[
    bool,
    typer.Option("--raw", help="The trained weights instead of the averaged ones."),
]


def export(
    checkpoint: _Checkpoint,
    out: _Out,
    names: _Names = None,
    program: _For = None,
    raw: _Raw = False,
) -> None:
    """Write a checkpoint's weights as one safetensors file.

    They are whole, whatever layout they were trained in.

    checkpoint.pretrained_checkpoint starts a run from such a file, of either naming. With --for dfm it is a folder
    with a checkpoint of NVIDIA DFM's DiT, from which either program starts.

    Example: dfmspec export runs/butterfly_tiny_cpu/latest -o butterfly.safetensors --names dfm
    """
    checkpoint = named_folder(checkpoint, "an iter_N folder, a folder of checkpoints, a run directory")
    if out.exists():
        raise UsageError(f"--out {out}: it exists already; name another file")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist; name another file")
    if names is not None and program is not None:
        raise UsageError("--names is for a file, and --for writes a folder; leave one out")
    arguments = [str(checkpoint), str(out)]
    if names is not None:
        arguments += ["--names", names.value]
    if program is not None:
        arguments += ["--for", program.value]
    if raw:
        arguments.append("--raw")
    raise typer.Exit(trainer_module("commands.export", *arguments))
