"""The amax of what a kernel writes (`trainer/ops/amax.py`): the largest absolute value.

It is held as its bits: those of numbers that are not negative have the order of the numbers, and NaN is above all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bits(x):
    """Of the absolute values of x, fp32."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def raise_amax_to(amax, found):
    """Let the bits at `amax` be at least `found`. Asked first: changes of one address take turns, and few programs have one to make."""
    if found > tl.load(amax, volatile=True):
        tl.atomic_max(amax, found, sem="relaxed")


def new_amax(x: Tensor, wanted: bool = True) -> Tensor:
    """[] fp32 on x's device: zero; empty where it is not wanted."""
    return x.new_zeros((), dtype=torch.float32) if wanted else x.new_empty(0, dtype=torch.float32)


def as_bits(amax: Tensor) -> Tensor:
    """For a kernel."""
    return amax.view(torch.int32)
