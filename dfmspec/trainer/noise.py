"""Counter-based randomness: what a sample meets is a function of (seed, stream, ordinal in the stream).

Never of the rank, of the layout, or of how often the run was resumed: the numbers are drawn for the whole sample from
a generator seeded by those counters, and cut afterwards. So nothing random has to be saved, and every layout trains on
the same noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def counter_seed(*counters: int | str) -> int:
    """A 63-bit seed from the counters, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What training adds to one sample."""

    sigma: float
    """Noise level: ln sigma ~ N(p_mean, p_std^2)."""
    keep_condition: bool
    """False: the text is replaced by zeros."""
    noise: Tensor
    """Unit Gaussian noise of the latent's shape [C, T, H, W], fp32."""


def draw(
    shape: tuple[int, ...],
    *,
    seed: int,
    split: str,
    stream: int,
    ordinal: int,
    p_mean: float,
    p_std: float,
    dropout: float,
) -> Draw:
    """The draw of sample number `ordinal` of stream `stream`."""
    generator = torch.Generator().manual_seed(counter_seed(seed, split, stream, ordinal))
    level, condition = torch.randn((), generator=generator), torch.rand((), generator=generator)
    return Draw(
        sigma=float((p_mean + p_std * level.double()).exp()),
        keep_condition=float(condition) >= dropout,
        noise=torch.randn(shape, generator=generator),
    )
