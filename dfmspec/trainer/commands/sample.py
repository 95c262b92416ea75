"""Inference from a checkpoint: pictures by EDM's sampler on the averaged weights.

It runs in one process, whatever layout trained them.

usage: python -m dfmspec.trainer.commands.sample CKPT [--out DIR] [--num-samples N] [--caption TEXT ...] [--curve]
"""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dfmspec.data.encoders import EMBEDDED_PICTURES, EMBEDDED_TEXTS
from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import unused
from dfmspec.record.events import read_events
from dfmspec.record.locate import Located, locate
from dfmspec.record.run_dir import RunDir
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.encoders import picture_encoder, text_encoder
from dfmspec.trainer.ending import ended, say
from dfmspec.trainer.inference import load_model, one_process, sample_latents
from dfmspec.trainer.prepare.butterflies import butterfly

_UNSEEN_SEED = 1_000_003
"""Captions come from a series of butterflies that no dataset is drawn from (their words are those of any series)."""
_SIDE = 144
"""Pixels on a side of a picture in the grid."""
_GAP = 12
_TEXT = 60
"""Pixels of height for a caption."""

LatentShape = tuple[int, int, int, int]
"""[C, T, H, W]"""


def main(argv: list[str] | None = None) -> int:
    """Write pictures of a checkpoint's samples, and print their paths; the exit code is 1 when there can be none."""
    args = _parser().parse_args(argv)
    logging.disable(logging.WARNING)
    return ended(partial(_sample, args), args.out)


def _sample(args: argparse.Namespace) -> int:
    checkpoint = locate(args.checkpoint, say)
    experiment = one_process(checkpoint.config)
    if not checkpoint.is_own and args.resolution is None:
        raise CheckpointError(f"{checkpoint.path} does not say the size of its pictures; name it with --resolution")
    shape = _latent_shape(experiment, args.resolution)
    numbers = range(args.num_samples)
    captions = args.caption or [butterfly(_UNSEEN_SEED, i).caption for i in numbers]
    latents = _latents(checkpoint, experiment, captions, shape, args)
    out = args.out or unused(checkpoint.path.parent.parent / "samples")
    written = _write_pictures(latents, captions, out)
    events = RunDir(args.checkpoint).events
    if args.curve and events.exists():
        draw_curve(events, out / "loss.png")
        written.append(out / "loss.png")
    print("\n".join(map(str, written)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dfmspec.trainer.commands.sample")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--caption", action="append")
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--resolution", type=int, help="pixels on a side, instead of data.resolution")
    parser.add_argument("--curve", action="store_true", help="draw the loss curve of the run directory too")
    return parser


def _latent_shape(experiment: Experiment, resolution: int | None) -> LatentShape:
    """[C, T, H, W] of a picture's latent, at data.resolution unless another one is given.

    Raises:
        CheckpointError: the embedded codec and text encoder do not fit the model, or the picture is too large for it.
    """
    model = experiment.model
    pictures = EMBEDDED_PICTURES
    texts = EMBEDDED_TEXTS
    side = (resolution or experiment.data.resolution) // pictures.compression
    fits_pictures = model.in_channels == pictures.channels
    fits_texts = model.crossattn_emb_size == texts.width
    if not fits_pictures or not fits_texts:
        raise CheckpointError(
            f"the embedded codec has {pictures.channels} channels and the text encoder width {texts.width}; "
            "this model has others"
        )
    limit = min(model.max_img_h, model.max_img_w)
    if side > limit:
        pixels = side * pictures.compression
        most = limit * pictures.compression
        raise CheckpointError(f"{pixels} px is more than this model's {most} (model.max_img_h, model.max_img_w)")
    return model.in_channels, model.patch_temporal, side, side


def _latents(
    checkpoint: Located,
    experiment: Experiment,
    captions: Sequence[str],
    shape: LatentShape,
    args: argparse.Namespace,
) -> Tensor:
    """[n, C, T, H, W] samples of the model, one for each caption."""
    guidance = args.guidance
    if guidance is None:
        guidance = experiment.diffusion.guidance
    text = text_encoder(EMBEDDED_TEXTS)
    model = load_model(checkpoint, experiment, raw=args.raw)
    latents = sample_latents(
        model,
        experiment,
        [text.encode(caption) for caption in captions],
        shape,
        seed=args.seed,
        num_steps=args.num_steps or experiment.diffusion.num_steps,
        guidance=guidance,
    )
    dist.destroy_process_group()
    return latents


def _write_pictures(latents: Tensor, captions: Sequence[str], out: Path) -> list[Path]:
    """Write a picture of each latent, and all of them as a grid; returns the files.

    Raises:
        OSError: they cannot be written; none is left.
    """
    codec = picture_encoder(EMBEDDED_PICTURES)
    first_frames = [codec.decode(latent)[0] for latent in latents]
    pictures = [Image.fromarray(frame.numpy()) for frame in first_frames]
    drawn = {out / f"sample_{i:03d}.png": picture for i, picture in enumerate(pictures)}
    drawn[out / "grid.png"] = grid(pictures, captions)
    out.mkdir(parents=True, exist_ok=True)
    try:
        for file, picture in drawn.items():
            picture.save(file)
    except OSError:
        for file in drawn:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # there was something in it before
            out.rmdir()
        raise
    return list(drawn)


def grid(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """One picture of several, each over its caption, four in a row."""
    # The sheet: a cell has a picture, its text under it, and a gap.
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    width = _SIDE + _GAP
    height = _SIDE + _TEXT + _GAP
    size = (columns * width + _GAP, rows * height + _GAP)
    sheet = Image.new("RGB", size, "white")

    # The cells.
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(i, columns)
        x = _GAP + column * width
        y = _GAP + row * height
        resized = picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        sheet.paste(resized, (x, y))
        lines = textwrap.wrap(caption, 24)[:4]
        pen.text(
            (x, y + _SIDE + 2),
            "\n".join(lines),
            fill="black",
            font=font,
        )
    return sheet


def draw_curve(events: Path, out: Path) -> None:
    """Draw the training and evaluation losses of a run's events, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), dpi=120)
    highest = _plot_losses(axes, events)
    axes.axhline(1.0, color="#888888", linestyle=":", linewidth=1)
    axes.set(
        xlabel="iteration",
        ylabel="EDM loss (untrained: 1)",
        ylim=(0, max(1.1, 1.02 * highest)),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


def _plot_losses(axes: Any, events: Path) -> float:
    """Plot the losses on matplotlib's axes; returns the highest mean of the training's."""
    train = _losses(events, "iteration")
    evaluation = _losses(events, "evaluation")
    losses = list(train.values())

    # Each iteration, and their running mean.
    window = max(1, len(losses) // 30)
    smooth = _running_mean(losses, window)
    axes.plot(
        list(train),
        losses,
        color="#9bb8d3",
        linewidth=0.8,
        label="training, each iteration",
    )
    axes.plot(
        list(train),
        smooth,
        color="#1f5a93",
        linewidth=1.8,
        label=f"training, mean of {window}",
    )
    axes.plot(
        list(evaluation),
        list(evaluation.values()),
        "o-",
        color="#c8553d",
        markersize=4,
        label="evaluation",
    )
    return max(smooth)


def _losses(events: Path, kind: str) -> dict[int, float]:
    """The loss of each iteration, from the events of one type; the last one where an iteration was repeated."""
    return {event["iteration"]: event["loss"] for event in read_events(events, kinds=[kind])}


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` of them or as many as there are."""
    means = []
    for end in range(1, len(values) + 1):
        last = values[max(0, end - window) : end]
        means.append(sum(last) / len(last))
    return means


if __name__ == "__main__":
    sys.exit(main())
