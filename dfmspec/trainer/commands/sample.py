"""Inference from a checkpoint: pictures by EDM's sampler on the averaged weights, in one process whatever layout trained them.

usage: python -m dfmspec.trainer.commands.sample CKPT [--out DIR] [--num-samples N] [--caption TEXT ...] [--curve]
"""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from dfmspec.errors import CheckpointError
from dfmspec.record import checkpoints
from dfmspec.record.events import read_events
from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.encoders.ngram import NgramTextEncoder
from dfmspec.trainer.inference import load_model, locate, one_process, sample_latents
from dfmspec.trainer.prepare.butterflies import butterfly

_UNSEEN_SEED = 1_000_003
"""Captions come from a series of butterflies that no dataset is drawn from (their words are those of any series)."""


def grid(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Pictures beside their captions, four in a row."""
    side, columns, gap, text = 144, min(4, len(pictures)), 12, 60
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + text + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        pen.text((x, y + side + 2), "\n".join(textwrap.wrap(caption, 24)[:4]), fill="black", font=font)
    return sheet


def draw_curve(events: Path, out: Path) -> None:
    """The training and evaluation losses of a run's events, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train, evaluation = ({e["iteration"]: e["loss"] for e in read_events(events) if e["type"] == kind} for kind in ("iteration", "evaluation"))
    figure, axes = pyplot.subplots(figsize=(6, 3.4), dpi=120)
    iterations, losses = list(train), list(train.values())
    window = max(1, len(losses) // 30)
    smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(iterations, losses, color="#9bb8d3", linewidth=0.8, label="training, each iteration")
    axes.plot(iterations, smooth, color="#1f5a93", linewidth=1.8, label=f"training, mean of {window}")
    axes.plot(list(evaluation), list(evaluation.values()), "o-", color="#c8553d", markersize=4, label="evaluation")
    axes.axhline(1.0, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="iteration", ylabel="EDM loss (untrained: 1)", ylim=(0, max(1.1, 1.02 * max(smooth))))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out)


def main(argv: list[str] | None = None) -> int:
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
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    try:
        checkpoint, manifest = locate(args.checkpoint)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    experiment = one_process(manifest["config"])
    captions = args.caption or [butterfly(_UNSEEN_SEED, i).caption for i in range(args.num_samples)]
    text = NgramTextEncoder()
    side = (args.resolution or experiment.data.resolution) // 8
    text_width = text.encode("").size(1)
    if (experiment.model.in_channels, experiment.model.crossattn_emb_size) != (16, text_width):
        print(f"error: the embedded codec has 16 channels and the text encoder width {text_width}; this model has others", file=sys.stderr)
        return 1
    limit = min(experiment.model.max_img_h, experiment.model.max_img_w)
    if side > limit:
        print(f"error: {side * 8} px is more than this model's {limit * 8} (model.max_img_h, model.max_img_w)", file=sys.stderr)
        return 1
    latents = sample_latents(
        load_model(checkpoint, experiment, raw=args.raw), experiment, [text.encode(caption) for caption in captions],
        (experiment.model.in_channels, experiment.model.patch_temporal, side, side), seed=args.seed,
        num_steps=args.num_steps or experiment.diffusion.num_steps,
        guidance=experiment.diffusion.guidance if args.guidance is None else args.guidance,
    )  # fmt: skip
    torch.distributed.destroy_process_group()
    out = args.out or checkpoints.unused(checkpoint.parent.parent / "samples")
    out.mkdir(parents=True, exist_ok=True)
    codec = DctCodec()
    pictures = [Image.fromarray(codec.decode(latent)[0].numpy()) for latent in latents]
    written = []
    for i, picture in enumerate(pictures):
        written.append(out / f"sample_{i:03d}.png")
        picture.save(written[-1])
    grid(pictures, captions).save(out / "grid.png")
    written.append(out / "grid.png")
    events = args.checkpoint / "events.jsonl"
    if args.curve and events.exists():
        draw_curve(events, out / "loss.png")
        written.append(out / "loss.png")
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
