"""dfmspec sample: pictures from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import complete_run, named_folder, trainer_module
from dfmspec.errors import UsageError

_Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CKPT",
        help="An iter_N folder, a folder of checkpoints, a run directory, or a run by its name or id.",
        autocompletion=complete_run,
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for the pictures; default: samples beside the checkpoints, or samples-2, ...",
    ),
]
_NumSamples = Annotated[
    int,
    typer.Option(help="Pictures to draw.", min=1),
]
_Caption = Annotated[
    list[str] | None,
    typer.Option(help="Draw this caption; repeatable. Default: those of the embedded butterflies."),
]
_NumSteps = Annotated[
    int | None,
    typer.Option(help="Noise levels, instead of diffusion.num_steps.", min=1),
]
_Guidance = Annotated[
    float | None,
    typer.Option(help="Classifier-free guidance, instead of diffusion.guidance.", min=0),
]
_Resolution = Annotated[
    int | None,
    typer.Option(help="Pixels on a side, a multiple of 16, instead of data.resolution.", min=16),
]
_Seed = Annotated[
    int,
    typer.Option(help="Seed of the noise.", min=0),
]
_Raw = Annotated[
    bool,
    typer.Option("--raw", help="Use the trained weights instead of the averaged ones."),
]


def sample(
    checkpoint: _Checkpoint,
    out: _Out = None,
    num_samples: _NumSamples = 16,
    caption: _Caption = None,
    num_steps: _NumSteps = None,
    guidance: _Guidance = None,
    resolution: _Resolution = None,
    seed: _Seed = 0,
    raw: _Raw = False,
) -> None:
    """Draw pictures from a checkpoint.

    With EDM's second-order sampler, on the CPU or one GPU, from any checkpoint.

    Prints the path of each picture. Averaged weights are used unless --raw is given.

    Example: dfmspec sample runs/butterfly_tiny_cpu/latest --caption "blue butterfly with round spotted wings"
    """
    # What can be seen from here.
    checkpoint = named_folder(checkpoint, "an iter_N folder, a folder of checkpoints, a run directory")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if resolution is not None and resolution % 16:
        raise UsageError(f"--resolution {resolution} is not a multiple of 16")

    # The words of the trainer's own command; what is not given, it takes from the checkpoint.
    arguments = [str(checkpoint), "--num-samples", str(num_samples), "--seed", str(seed)]
    for text in caption or []:
        arguments += ["--caption", text]
    given = {
        "--out": out,
        "--resolution": resolution,
        "--num-steps": num_steps,
        "--guidance": guidance,
    }
    for flag, value in given.items():
        if value is not None:
            arguments += [flag, str(value)]
    if raw:
        arguments.append("--raw")
    raise typer.Exit(trainer_module("commands.sample", *arguments))
