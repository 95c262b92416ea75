"""A matrix with its amax, the largest of its absolute values; an amax's gradient is the amax of the matrix's gradient.

A GEMM in FP8 scales both by them. adaLN and the heads have the values at hand as they write what a GEMM reads, forward
or backward; a pass for the amax alone took 9 of 290 ms of a step of DiT-XL on an H100. What others make (attention, a
GELU, weights, text) is read for it still.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
MAX_SCALE = 2.0**126
"""So that a scale and its inverse are finite."""


class WithAmax(NamedTuple):
    """A tensor with its amax, or with none where nobody needs or knows it."""

    values: Tensor
    amax: Tensor | None = None
    """[] fp32; beside a GEMM's output, only what stands for it, so that it has a gradient."""


def with_amax(x: Tensor, *, wanted: bool) -> WithAmax:
    """x, with its amax where it is wanted; by plain PyTorch."""
    amax = amax_of(x.detach()) if wanted else None
    return WithAmax(x, amax)


def with_gradient_amax(x: WithAmax) -> Tensor:
    """The values, whose gradient comes with its amax; by plain PyTorch."""
    if x.amax is None:
        return x.values
    return _GradientAmax.apply(x.values, x.amax)


def amax_of(x: Tensor) -> Tensor:
    """The largest absolute value of x, [] fp32; NaN where there is one."""
    return x.abs().amax().float()


class _GradientAmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, amax: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, amax_of(gradient)
