"""dfmspec sample: pictures from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import trainer_module
from dfmspec.errors import UsageError


def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="An iter_N folder, a folder of checkpoints, or a run directory.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the pictures; default: samples beside the checkpoints, or samples-2, ...")] = None,
    num_samples: Annotated[int, typer.Option(help="Pictures to draw.", min=1)] = 16,
    caption: Annotated[list[str] | None, typer.Option(help="Draw this caption; repeatable. Default: those of the embedded butterflies.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Noise levels, instead of diffusion.num_steps.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance, instead of diffusion.guidance.", min=0)] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels on a side, a multiple of 16, instead of data.resolution.", min=16)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Use the trained weights instead of the averaged ones.")] = False,
) -> None:
    """Draw pictures with EDM's second-order sampler, on the CPU or one GPU, from any checkpoint.

    Prints the path of each picture. Averaged weights are used unless --raw is given.

    Example: dfmspec sample runs/butterfly_tiny_cpu/latest --caption "blue butterfly with round spotted wings"
    """
    if not checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is not a folder; name an iter_N folder, a folder of checkpoints, or a run directory")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if resolution is not None and resolution % 16:
        raise UsageError(f"--resolution {resolution} is not a multiple of 16")
    arguments = [str(checkpoint), "--num-samples", str(num_samples), "--seed", str(seed)]
    arguments += [word for text in caption or [] for word in ("--caption", text)]
    for flag, value in (("--out", out), ("--resolution", resolution), ("--num-steps", num_steps), ("--guidance", guidance)):
        if value is not None:
            arguments += [flag, str(value)]
    raise typer.Exit(trainer_module("commands.sample", *arguments, *(["--raw"] if raw else [])))
