"""Gradients into the buffer that is reduced (`trainer/optim/gradients.py`), and the update of the weights (`trainer/optim/update.py`)."""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 1024, 8


@triton.jit
def _accumulate_kernel(total, part, size, REPLACE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(part + at, mask=at < size).to(tl.float32)
    if not REPLACE:
        value += tl.load(total + at, mask=at < size).to(tl.float32)
    tl.store(total + at, value, mask=at < size)


def accumulate(total: Tensor, part: Tensor, *, replace: bool) -> None:
    """total += part, in fp32; to `replace`: total = part."""
    size = part.numel()
    _accumulate_kernel[(triton.cdiv(size, _BLOCK),)](total, part.contiguous(), size, REPLACE=replace, BLOCK=_BLOCK, num_warps=_WARPS)


UPDATE_BLOCK, _UPDATE_WARPS = 2048, 4
"""Values of one program of `update`, and its warps."""


@triton.jit
def _update_kernel(
    blocks, norm, clip, lr, weight_decay, beta1, beta2, eps, correction1, correction2, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = blocks + tl.program_id(0).to(tl.int64) * 6
    main = tl.multiple_of(tl.load(row), 16).to(tl.pointer_type(tl.float32))
    gradient = tl.multiple_of(tl.load(row + 1), 16).to(tl.pointer_type(tl.float32))
    first = tl.multiple_of(tl.load(row + 2), 16).to(tl.pointer_type(tl.float32))
    second = tl.multiple_of(tl.load(row + 3), 16).to(tl.pointer_type(tl.float32))
    weight = tl.multiple_of(tl.load(row + 4), 16).to(tl.pointer_type(tl.bfloat16))
    length = tl.load(norm)
    at = tl.arange(0, BLOCK)
    live = at < tl.where(length < float("inf"), tl.load(row + 5), 0)  # a norm that is not a number is no less than infinity
    g = tl.load(gradient + at, mask=live, other=0.0) * tl.minimum(clip / (length + 1e-6), 1.0)
    m = tl.load(first + at, mask=live, other=0.0) * beta1 + g * (1 - beta1)
    v = tl.load(second + at, mask=live, other=0.0) * beta2 + g * g * (1 - beta2)
    p = tl.load(main + at, mask=live, other=0.0)
    p -= lr * ((m / correction1) / (tl.sqrt(v / correction2) + eps) + weight_decay * p)
    tl.store(first + at, m, mask=live)
    tl.store(second + at, v, mask=live)
    tl.store(main + at, p, mask=live)
    if WRITE:
        tl.store(weight + at, p.to(tl.bfloat16), mask=live)


def update(
    blocks: Tensor, norm: Tensor, *, clip: float, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, step: int, write: bool,
) -> None:  # fmt: skip
    """Adam with decoupled weight decay (arXiv 1711.05101) on gradients clipped to norm `clip`, in one pass; nothing if `norm` [] is not finite.

    `blocks` [k, 6] int64: addresses of up to UPDATE_BLOCK values of weight, gradient and both moments in fp32 and, to `write`, of the
    bf16 copy of the weight; and how many they are. All on 16 bytes.
    """
    beta1, beta2 = betas
    _update_kernel[(len(blocks),)](
        blocks, norm, clip, lr, weight_decay, beta1, beta2, eps, 1 - beta1**step, 1 - beta2**step, WRITE=write, BLOCK=UPDATE_BLOCK, num_warps=_UPDATE_WARPS,
    )  # fmt: skip
