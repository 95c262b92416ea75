"""Measures the mean and the deviation of each coefficient of the embedded codec over the embedded pictures: the source of its tables."""

from __future__ import annotations

import numpy as np
import torch

from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.prepare.butterflies import butterfly, draw


def measure(resolution: int = 128, pictures: int = 256) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each of the 16 coefficients."""
    frames = [torch.from_numpy(np.array(draw(butterfly(0, index), resolution))) for index in range(pictures)]
    values = DctCodec().coefficients(torch.stack(frames)).flatten(1)
    return values.mean(dim=1).tolist(), values.std(dim=1).tolist()


if __name__ == "__main__":
    for label, numbers in zip(("_MEAN", "_STD"), measure(), strict=True):
        print(label, "=", [round(number, 4) for number in numbers])
