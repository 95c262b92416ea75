"""Latents as tokens: a token is one patch of pt x p x p latent pixels, P = C pt p p values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


def patchify(latent: Tensor, pt: int, p: int) -> Tensor:
    """[C, T, H, W] -> [tokens, P], frames first, then rows, then columns."""
    return rearrange(latent, "c (t pt) (h ph) (w pw) -> (t h w) (ph pw pt c)", pt=pt, ph=p, pw=p)


def unpatchify(tokens: Tensor, shape: tuple[int, int, int, int], pt: int, p: int) -> Tensor:
    """[tokens, P] -> [C, T, H, W] of `shape`."""
    _, t, h, w = shape
    return rearrange(
        tokens,
        "(t h w) (ph pw pt c) -> c (t pt) (h ph) (w pw)",
        t=t // pt,
        h=h // p,
        w=w // p,
        pt=pt,
        ph=p,
        pw=p,
    )


def num_tokens(shape: Sequence[int], pt: int, p: int) -> int:
    """Tokens of a latent of shape [C, T, H, W]."""
    _, t, h, w = shape
    return (t // pt) * (h // p) * (w // p)


def patch_positions(shape: Sequence[int], pt: int, p: int) -> Tensor:
    """[tokens, 3]: (t, h, w) of each patch."""
    _, t, h, w = shape
    axes = (
        torch.arange(t // pt),
        torch.arange(h // p),
        torch.arange(w // p),
    )
    grid = torch.meshgrid(*axes, indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, 2)
