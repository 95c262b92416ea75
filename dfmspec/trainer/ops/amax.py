"""A matrix and the number beside it: the largest of its values, and, as that number's gradient, the largest of its gradient.

A product in FP8 scales both by their largest values. adaLN and the heads have the values at hand as they write what products
read, forward or backward; a pass for the numbers alone took 9 of 290 ms of a step of DiT-XL on an H100. What others make
(attention, a GELU, weights, text) is read for it still.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


MOST_SCALE = 2.0**126
"""So that it and its inverse are numbers."""


class Measured(NamedTuple):
    """Where nobody needs or knows the number, there is none."""

    values: Tensor
    largest: Tensor | None = None
    """[] fp32, of the absolute values; of a product's output, only what stands for it, so that it has a gradient."""


def measured(x: Tensor, *, measure: bool) -> Measured:
    """x, to `measure` with its number; by plain PyTorch."""
    return Measured(x, largest_of(x.detach()) if measure else None)


def told(x: Measured) -> Tensor:
    """The values, whose gradient comes with its number; by plain PyTorch."""
    output: Tensor = x.values if x.largest is None else _Tell.apply(*x)
    return output


def largest_of(x: Tensor) -> Tensor:
    """[] fp32; NaN where there is one."""
    return x.abs().amax().float()


class _Tell(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, largest: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gradient, largest_of(gradient)
