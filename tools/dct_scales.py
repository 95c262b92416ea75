"""Measures each coefficient of the embedded codec over the embedded pictures: its mean and its deviation.

The source of the codec's tables, dfmspec/trainer/encoders/dct.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dfmspec.trainer.encoders.dct import DctCodec
from dfmspec.trainer.prepare.butterflies import butterfly, draw


def picture(index: int, resolution: int) -> Tensor:
    """A picture of the embedded data, [height, width, 3] of bytes."""
    pixels = np.array(draw(butterfly(0, index), resolution))
    return torch.from_numpy(pixels)


def measure(resolution: int = 128, pictures: int = 256) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each of the 16 coefficients."""
    frames = torch.stack([picture(index, resolution) for index in range(pictures)])
    values = DctCodec().coefficients(frames).flatten(1)
    return values.mean(dim=1).tolist(), values.std(dim=1).tolist()


if __name__ == "__main__":
    for label, numbers in zip(("_MEAN", "_STD"), measure(), strict=True):
        print(label, "=", [round(number, 4) for number in numbers])
