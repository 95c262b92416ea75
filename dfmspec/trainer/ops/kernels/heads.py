"""Heads (`trainer/network/attention.py`): q, k and v out of one projection, q and k normed. A row is one head of one token."""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfmspec.trainer.ops.buffers import buffer_of
from dfmspec.trainer.ops.kernels.amax import as_bits, bits, new_amax, raise_amax_to

_TILE = 16
"""Rows that a program holds at a time."""
_FORWARD_WARPS, _WARPS = 2, 8
_STAGES = 3
"""Tiles of the backward pass that are on their way at a time."""
_PROGRAMS = 1056
"""Of the backward pass, at most: what each sums of the weights' gradients is summed again."""


@triton.jit
def _head(x, weight, out, row, columns, live, eps, D: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr):
    value = tl.load(x + row * STRIDE + columns, mask=live, other=0.0).to(tl.float32)
    if NORMED:
        value *= tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        value *= tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + columns, value.to(out.dtype.element_ty), mask=live)


@triton.jit
def _heads_kernel(
    x, w0, w1, out0, out1, out2, rows, eps, D: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    live = (row < rows) & (columns < D)
    _head(x, w0, out0, row, columns, live, eps, D, PARTS * D, NORMED > 0)
    if PARTS > 1:
        _head(x + D, w1, out1, row, columns, live, eps, D, PARTS * D, NORMED > 1)
    if PARTS > 2:
        _head(x + 2 * D, w1, out2, row, columns, live, eps, D, PARTS * D, False)


@triton.jit
def _head_backward(
    x, weight, d_out, dx, total, found, row, columns, live, eps, D: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr, AMAX: tl.constexpr
):  # fmt: skip
    d = tl.load(d_out + row * D + columns, mask=live, other=0.0).to(tl.float32)
    if NORMED:
        value = tl.load(x + row * STRIDE + columns, mask=live, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        normed = value * r
        total += d * normed
        d *= tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        d = (d - normed * (tl.sum(d * normed, 1) / D)[:, None]) * r
    rounded = d.to(dx.dtype.element_ty)
    tl.store(dx + row * STRIDE + columns, rounded, mask=live)
    if AMAX:
        found = tl.maximum(found, bits(rounded.to(tl.float32)))
    return total, found


@triton.jit
def _heads_backward_kernel(
    x, w0, w1, d0, d1, d2, dx, sums, amax, rows, tiles, eps, D: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, AMAX: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    total0 = tl.zeros([TILE, BLOCK], tl.float32)
    total1 = tl.zeros([TILE, BLOCK], tl.float32)
    found = tl.zeros([TILE, BLOCK], tl.int32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        row = ((tl.program_id(0).to(tl.int64) * tiles + tile) * TILE + tl.arange(0, TILE))[:, None]
        live = (row < rows) & (columns < D)
        total0, found = _head_backward(x, w0, d0, dx, total0, found, row, columns, live, eps, D, PARTS * D, NORMED > 0, AMAX)
        if PARTS > 1:
            total1, found = _head_backward(x + D, w1, d1, dx + D, total1, found, row, columns, live, eps, D, PARTS * D, NORMED > 1, AMAX)
        if PARTS > 2:
            total1, found = _head_backward(x + 2 * D, w1, d2, dx + 2 * D, total1, found, row, columns, live, eps, D, PARTS * D, False, AMAX)
    if AMAX:
        raise_amax_to(amax, tl.max(tl.max(found, 0), 0))
    at = tl.arange(0, BLOCK)
    here = sums + tl.program_id(0) * NORMED * D + at
    tl.store(here, tl.sum(total0, 0), mask=at < D)
    if NORMED > 1:
        tl.store(here + D, tl.sum(total1, 0), mask=at < D)


@triton.jit
def _sum_kernel(sums, out0, out1, rows, D: tl.constexpr, NORMED: tl.constexpr, REPLACE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, NORMED, D] -> NORMED of [D], into or onto what is there, in an order that is always the same."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, rows, ROWS, num_stages=3):
        row = (first + tl.arange(0, ROWS))[:, None]
        at = (row * NORMED + tl.program_id(1)) * D + columns[None, :]
        total += tl.load(sums + at, mask=(row < rows) & inside[None, :], other=0.0)
    value = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        _deliver(out0 + columns, value, inside, REPLACE)
    else:
        _deliver(out1 + columns, value, inside, REPLACE)


@triton.jit
def _deliver(out, value, inside, REPLACE: tl.constexpr):
    if not REPLACE:
        value += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, value.to(out.dtype.element_ty), mask=inside)


def _three(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None, None][:3]


@torch.library.custom_op("dfmspec::heads", mutates_args=())
def heads(x: Tensor, weights: list[Tensor], parts: int, width: int, eps: float, x_amax: Tensor | None) -> list[Tensor]:
    """[t, h parts d] -> `parts` (1 to 3) tensors [t, h, d], each contiguous; the first ones normed by RMSNorm with `weights` (1 or 2 of [d]).

    `x_amax` only stands for the amax of x, whose gradient is the amax of x's gradient.
    """
    x = x.contiguous()
    shape = (x.size(0), x.size(1) // (parts * width), width)
    outputs = [x.new_empty(shape) for _ in range(parts)]
    rows = shape[0] * shape[1]
    _heads_kernel[(triton.cdiv(rows, _TILE),)](
        x, *_three(weights)[:2], *_three(outputs), rows, eps, D=width, PARTS=parts, NORMED=len(weights),
        TILE=_TILE, BLOCK=triton.next_power_of_2(width), num_warps=_FORWARD_WARPS,
    )  # fmt: skip
    return outputs


@heads.register_fake
def _(x, weights, parts, width, eps, x_amax):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.size(0), x.size(1) // (parts * width), width) for _ in range(parts)]


@torch.library.custom_op("dfmspec::heads_backward", mutates_args=())
def heads_backward(x: Tensor, weights: list[Tensor], d_outs: list[Tensor], eps: float, wants_amax: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """dx [t, h parts d], the weights' gradients [d], or what stands for them (as `gemm.weight_gradient`), and, where `wants_amax`, the amax of dx."""
    x, d_outs = x.contiguous(), [d_out.contiguous() for d_out in d_outs]
    parts, width = len(d_outs), d_outs[0].size(-1)
    rows = d_outs[0].numel() // width
    tiles = triton.cdiv(rows, _TILE * _PROGRAMS)
    programs = triton.cdiv(rows, _TILE * tiles)
    dx, amax, sums = torch.empty_like(x), new_amax(x, wants_amax), x.new_empty(programs, len(weights), width, dtype=torch.float32)
    _heads_backward_kernel[(programs,)](
        x, *_three(weights)[:2], *_three(d_outs), dx, sums, as_bits(amax), rows, tiles, eps, D=width, PARTS=parts, NORMED=len(weights), AMAX=wants_amax,
        TILE=_TILE, BLOCK=triton.next_power_of_2(width), STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip
    gradients, buffers = [torch.empty_like(weight) for weight in weights], [buffer_of(weight) for weight in weights]
    outs = [gradient if total is None else total for gradient, (total, _) in zip(gradients, buffers, strict=True)]
    _sum_kernel[(triton.cdiv(width, 16), len(weights))](
        sums, outs[0], outs[-1], programs, D=width, NORMED=len(weights), REPLACE=buffers[0][1], ROWS=256, COLUMNS=16, num_warps=8
    )
    return dx, gradients, amax


@heads_backward.register_fake
def _(x, weights, d_outs, eps, wants_amax):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), [torch.empty_like(weight) for weight in weights], new_amax(x, wants_amax)


def _keep_heads(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, _parts, _width, ctx.eps, x_amax = inputs
    ctx.wants_amax = x_amax is not None
    ctx.save_for_backward(x, *weights)


def _heads_gradients(ctx, d_outs):  # type: ignore[no-untyped-def]
    x, *weights = ctx.saved_tensors
    dx, d_weights, amax = heads_backward(x, weights, d_outs, ctx.eps, ctx.wants_amax)
    return dx, d_weights, None, None, None, amax if ctx.wants_amax else None


heads.register_autograd(_heads_gradients, setup_context=_keep_heads)
