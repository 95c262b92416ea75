"""The embedded codec: an 8x8 block DCT in YCbCr, of which it keeps the 16 most telling coefficients.

Each 8x8 block of a frame is one latent pixel. Ten low frequencies of the brightness and three of each colour difference
are its channels, shifted and scaled to mean 0 and variance 1 over the embedded pictures (measured by
`python tools/dct_scales.py`). The DCT is orthonormal, so decoding is its transpose with zeros elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ZIGZAG = ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))
_CHANNELS = [
    *((0, v, u) for v, u in _ZIGZAG),
    *((1, v, u) for v, u in _ZIGZAG[:3]),
    *((2, v, u) for v, u in _ZIGZAG[:3]),
]
"""(component, vertical, horizontal frequency) of each latent channel."""

_MEAN = [
    0.5061, -0.0004, 0.0305, 0.006, -0.0017, -0.0056, 0.0006, -0.0028,
    0.0017, 0.0047, -0.2178, -0.0001, -0.0005, 0.0284, -0.0004, -0.001,
]  # fmt: skip
_STD = [
    3.1319, 0.7382, 0.619, 0.3575, 0.4404, 0.4005, 0.2194, 0.308,
    0.2961, 0.2116, 1.5038, 0.3192, 0.2688, 1.2673, 0.3077, 0.2586,
]  # fmt: skip

# ITU-R BT.601, full range, as in JPEG.
_TO_YCBCR = torch.tensor(
    [
        [0.299, 0.587, 0.114],
        [-0.168736, -0.331264, 0.5],
        [0.5, -0.418688, -0.081312],
    ]
)


def _basis() -> Tensor:
    """[8, 8] orthonormal DCT-II: row = frequency."""
    k = torch.arange(8.0)[:, None]
    n = torch.arange(8.0)[None]
    basis = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


_DCT = _basis()


def _by_channel(values: list[float]) -> Tensor:
    """[16, 1, 1, 1], as a latent has its channels."""
    return torch.tensor(values).view(16, 1, 1, 1)


class DctCodec:
    """Weights-free codec; loses only detail finer than its 16 coefficients."""

    def coefficients(self, frames: Tensor) -> Tensor:
        """[T, H, W, 3] uint8, H and W multiples of 8 -> [16, T, H/8, W/8], not yet normalised."""
        ycbcr = (frames.float() / 127.5 - 1) @ _TO_YCBCR.T
        rows = ycbcr.permute(3, 0, 1, 2).unflatten(2, (-1, 8))
        blocks = rows.unflatten(4, (-1, 8))  # [3, T, h, 8, w, 8]
        spectrum = torch.einsum("vy,cthywx,ux->cvuthw", _DCT, blocks, _DCT)
        return torch.stack([spectrum[channel] for channel in _CHANNELS])

    def encode(self, frames: Tensor) -> Tensor:
        """[T, H, W, 3] uint8 -> [16, T, H/8, W/8] fp32 of unit variance."""
        return (self.coefficients(frames) - _by_channel(_MEAN)) / _by_channel(_STD)

    def decode(self, latent: Tensor) -> Tensor:
        """[16, T, h, w] -> [T, 8h, 8w, 3] uint8."""
        values = latent.float().cpu() * _by_channel(_STD) + _by_channel(_MEAN)
        spectrum = torch.zeros(3, 8, 8, *latent.shape[1:])
        for channel, value in zip(_CHANNELS, values, strict=True):
            spectrum[channel] = value
        blocks = torch.einsum("vy,cvuthw,ux->cthywx", _DCT, spectrum, _DCT)
        ycbcr = blocks.flatten(4, 5).flatten(2, 3).permute(1, 2, 3, 0)
        rgb = ycbcr @ torch.linalg.inv(_TO_YCBCR).T
        levels = ((rgb + 1) * 127.5).round()
        return levels.clamp(0, 255).to(torch.uint8)
