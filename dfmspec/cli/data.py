"""dfmspec data: make a WebDataset with Energon metadata, and look into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dfmspec.cli.arguments import trainer_module
from dfmspec.errors import FINDINGS, OK, UsageError
from dfmspec.targets import TARGETS, target_module

app = typer.Typer(
    help="Make a WebDataset with Energon metadata, and look into one.", no_args_is_help=True, rich_markup_mode=None
)

_RESOLUTIONS = (64, 128, 256, 512)
_Images = Annotated[
    Path | None,
    typer.Option(help="Take the pictures of this folder instead, with .txt captions of the same names."),
]


@app.command("prepare")
def prepare(
    out: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
    resolution: Annotated[int, typer.Option(help="Pixels on a side: 64, 128, 256 or 512.")] = 64,
    num_samples: Annotated[int, typer.Option(help="Pictures to draw.", min=8)] = 2048,
    seed: Annotated[int, typer.Option(help="Seed of the drawn pictures.", min=0)] = 0,
    images: _Images = None,
) -> None:
    """Draw butterflies, or take a folder of pictures, and write shards that Energon reads.

    A sample is a latent (.pth), a text embedding (.pickle) and a description (.json), made without any download.
    """
    if resolution not in _RESOLUTIONS:
        raise UsageError(f"--resolution {resolution}: one of {', '.join(map(str, _RESOLUTIONS))}")
    if images is not None and not images.is_dir():
        raise UsageError(f"--images {images} is not a folder")
    arguments = [str(out), "--resolution", str(resolution), "--num-samples", str(num_samples), "--seed", str(seed)]
    if images is not None:
        arguments += ["--images", str(images)]
    raise typer.Exit(trainer_module("prepare", *arguments))


@app.command("inspect")
def inspect(path: Annotated[Path, typer.Argument(help="Folder of a WebDataset.")]) -> None:
    """Read the first samples of every shard as the trainer would, and report shapes, spread and problems.

    `read_by` says of each target whether its Energon reads the metadata, or what is lacking. Nothing in a shard can run
    code. Exit code 1: there are problems.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder")
    from dfmspec.data.inspection import inspect as inspected

    found = inspected(path)
    found["read_by"] = {name: _unread_by(path, name) or True for name in TARGETS}
    typer.echo(json.dumps(found, indent=2))
    raise typer.Exit(FINDINGS if found["problems"] else OK)


def _unread_by(folder: Path, target: str) -> str | None:
    """Why a target cannot read a dataset's metadata; None: it can."""
    from dfmspec.data.upgrade import lacking

    names = lacking(folder, target_module(target).ENERGON)
    return f"no .nv-meta/{names[0]}; run: dfmspec data upgrade {folder}" if names else None


@app.command("upgrade")
def upgrade(path: Annotated[Path, typer.Argument(help="Folder of a WebDataset.")]) -> None:
    """Add the metadata that NVIDIA DFM's Energon 6 reads to a set of Energon 7's; shards are left alone.

    The files that were written go to stdout; none, where nothing is lacking. Unfinished runs on the set go on, unless
    its splits stood in split.json alone.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder")
    from dfmspec.data.upgrade import upgrade as upgraded

    for file in upgraded(path):
        typer.echo(str(file))
