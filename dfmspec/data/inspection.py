"""What `dfmspec data inspect` tells of a folder of shards, from the same samples that `validate --check data` reads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dfmspec.data.energon_metadata import split_counts
from dfmspec.data.samples import MOST_TOKENS, WHY_NOT_MORE, apart_fault
from dfmspec.data.shards import UNIT_VARIANCE, Scan, scan, spread
from dfmspec.data.tensors import Tensor


def inspect(folder: Path) -> dict[str, Any]:
    """Look through the first samples of every shard.

    Returns: shards, samples of each split, how many samples were read, the latents' shapes [C, T, H, W] with their
    numbers, mean and standard deviation of their values, the least and the most text tokens, and the problems, each of
    which names its sample or shard.
    """
    # What there is to count: whole samples.
    found = scan(folder)
    latents: list[Tensor] = []
    lengths: list[int] = []
    for sample in found.whole:
        if sample.latent is not None and sample.latent.finite:
            latents.append(sample.latent)
        if sample.text is not None:
            lengths.append(sample.text.shape[0])

    # Statistics.
    shapes = Counter(str(list(latent.shape)) for latent in latents)
    mean = None
    deviation = None
    if latents:
        mean, deviation = spread(latents)

    return {
        "path": str(folder),
        "shards": len(found.counts) + len(found.broken),
        "samples": split_counts(folder) or {},
        "read": len(latents),
        "latent_shapes": dict(shapes),
        "latent_mean": None if mean is None else round(mean, 4),
        "latent_std": None if deviation is None else round(deviation, 4),
        "text_tokens": [min(lengths), max(lengths)] if lengths else None,
        "problems": _problems(folder, found, deviation, lengths),
    }


def _problems(folder: Path, found: Scan, deviation: float | None, lengths: list[int]) -> list[str]:
    """What the trainer would stop at, or train badly on."""
    problems: list[str] = []

    # What cannot be read.
    if not (folder / ".nv-meta").is_dir():
        command = f"energon prepare --sample-type CrudeWebdataset {folder}"
        problems.append(f"{folder} has no .nv-meta; run: {command}")
    problems += [f"{folder}/{fault}" for fault in found.broken]
    for shard, keys in found.apart.items():
        count = len(keys)
        problems.append(f"{folder}/{shard}: of {count} samples, first {keys[0]}: {apart_fault()}")
    for sample in found.samples:
        if sample.problem:
            problems.append(f"sample {sample.place}: {sample.problem}")

    # What training on them would suffer from.
    if lengths and max(lengths) > MOST_TOKENS:
        problems.append(f"texts have up to {max(lengths)} tokens; {WHY_NOT_MORE}")
    if deviation is not None and not UNIT_VARIANCE[0] <= deviation <= UNIT_VARIANCE[1]:
        expected = "the trainer expects about 1 and multiplies by sigma_data"
        problems.append(f"latents have standard deviation {deviation:.3f}; {expected}")
    return problems
