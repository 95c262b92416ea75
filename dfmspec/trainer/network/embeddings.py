"""Embeddings of the DiT: sin-cos positions on three axes, and the noise level.

Shapes: s tokens, n segments, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """[n] positions -> [n, width]: sines, then cosines, of frequencies 1 down to 1/10000; fp32, or fp64 of such."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float64, device=positions.device)
    frequencies = 10000.0 ** (-steps / half)
    angles = positions.double()[:, None] * frequencies
    precision = torch.promote_types(positions.dtype, torch.float32)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(precision)


class PositionEmbedding(nn.Module):
    """Fixed sin-cos positions: a quarter of the width for time, three eighths each for height and width (as DFM)."""

    def __init__(self, hidden_size: int, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        quarter = hidden_size // 4
        three_eighths = 3 * hidden_size // 8
        widths = (quarter, three_eighths, three_eighths)
        for axis, size, width in zip("thw", sizes, widths, strict=True):
            table = sinusoid(torch.arange(size), width).to("cuda")
            self.register_buffer(f"table_{axis}", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """[s, 3] patch positions (t, h, w) -> [s, D]; a position past its axis's table is an IndexError."""
        t, h, w = positions.unbind(-1)
        of_time = self.table_t[t]
        of_height = self.table_h[h]
        of_width = self.table_w[w]
        return torch.cat([of_time, of_height, of_width], dim=-1)


class NoiseEmbedding(nn.Module):
    """The noise level as a vector: sinusoid, linear, SiLU, linear."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        kind: dict[str, Any] = {"dtype": config.params_dtype, "device": "cuda"}
        self.linear_1 = nn.Linear(width, width, **kind)
        self.linear_2 = nn.Linear(width, width, **kind)

    def forward(self, c_noise: Tensor) -> Tensor:
        """c_noise [n], as EDM gives it -> [n, D], in the precision of the weights."""
        x = sinusoid(c_noise, self.linear_1.in_features)
        x = x.to(self.linear_1.weight.dtype)
        x = nn.functional.silu(self.linear_1(x))
        return self.linear_2(x)


def axis_sizes(
    max_frames: int, max_img_h: int, max_img_w: int, patch_temporal: int, patch_spatial: int
) -> tuple[int, int, int]:
    """Sizes of the position tables for time, height and width, in patches."""
    frames = math.ceil(max_frames / patch_temporal)
    height = math.ceil(max_img_h / patch_spatial)
    width = math.ceil(max_img_w / patch_spatial)
    return frames, height, width
