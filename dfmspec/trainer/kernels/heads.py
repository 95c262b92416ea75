"""Heads (`trainer/attention.py`): q, k and v out of one projection, q and k normed. A row is one head of one token."""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORWARD_TILE, _FORWARD_WARPS = 16, 4
_TILE, _WARPS = 16, 8
"""Rows that a program holds at a time, and its warps; of the backward pass."""
_PROGRAMS = 1056
"""Of the backward pass, at most: what each sums of the weights' gradients is summed again."""
_SPLIT = True
"""Hold a head as two blocks, so that 72 channels are 64 and 8 and not 72 of 128."""


def _blocks(width: int) -> tuple[int, int]:
    """Channels of the two blocks that hold a head; powers of two, the second perhaps 0."""
    if not _SPLIT or width == triton.next_power_of_2(width):
        return triton.next_power_of_2(width), 0
    first = triton.next_power_of_2(width) // 2
    return first, triton.next_power_of_2(width - first)


@triton.jit
def _head(x, weight, out, row, live, eps, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr):
    a = tl.arange(0, WIDE)[None, :]
    x_a = tl.load(x + row * STRIDE + a, mask=live & (a < D), other=0.0).to(tl.float32)
    if REST:
        b = WIDE + tl.arange(0, REST)[None, :]
        x_b = tl.load(x + row * STRIDE + b, mask=live & (b < D), other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(x_a * x_a, 1)
        if REST:
            squares += tl.sum(x_b * x_b, 1)
        r = tl.rsqrt(squares / D + eps)[:, None]
        x_a *= r * tl.load(weight + a, mask=a < D, other=0.0).to(tl.float32)
        if REST:
            x_b *= r * tl.load(weight + b, mask=b < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + a, x_a.to(out.dtype.element_ty), mask=live & (a < D))
    if REST:
        tl.store(out + row * D + b, x_b.to(out.dtype.element_ty), mask=live & (b < D))


@triton.jit
def _heads_kernel(
    x, w0, w1, out0, out1, out2, rows, eps, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    live = row < rows
    _head(x, w0, out0, row, live, eps, D, WIDE, REST, PARTS * D, NORMED > 0)
    if PARTS > 1:
        _head(x + D, w1, out1, row, live, eps, D, WIDE, REST, PARTS * D, NORMED > 1)
    if PARTS > 2:
        _head(x + 2 * D, w1, out2, row, live, eps, D, WIDE, REST, PARTS * D, False)


@triton.jit
def _head_backward(
    x, weight, d_out, dx, total_a, total_b, row, live, eps,
    D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    a = tl.arange(0, WIDE)[None, :]
    b = WIDE + tl.arange(0, REST if REST else 1)[None, :]
    live_a, live_b = live & (a < D), live & (b < D)
    d_a = tl.load(d_out + row * D + a, mask=live_a, other=0.0).to(tl.float32)
    if REST:
        d_b = tl.load(d_out + row * D + b, mask=live_b, other=0.0).to(tl.float32)
    if NORMED:
        n_a = tl.load(x + row * STRIDE + a, mask=live_a, other=0.0).to(tl.float32)
        squares = tl.sum(n_a * n_a, 1)
        if REST:
            n_b = tl.load(x + row * STRIDE + b, mask=live_b, other=0.0).to(tl.float32)
            squares += tl.sum(n_b * n_b, 1)
        r = tl.rsqrt(squares / D + eps)[:, None]
        n_a *= r
        total_a += d_a * n_a
        d_a *= tl.load(weight + a, mask=a < D, other=0.0).to(tl.float32)
        along = tl.sum(d_a * n_a, 1)
        if REST:
            n_b *= r
            total_b += d_b * n_b
            d_b *= tl.load(weight + b, mask=b < D, other=0.0).to(tl.float32)
            along += tl.sum(d_b * n_b, 1)
        along = (along / D)[:, None]
        d_a = (d_a - n_a * along) * r
        if REST:
            d_b = (d_b - n_b * along) * r
    tl.store(dx + row * STRIDE + a, d_a.to(dx.dtype.element_ty), mask=live_a)
    if REST:
        tl.store(dx + row * STRIDE + b, d_b.to(dx.dtype.element_ty), mask=live_b)
    return total_a, total_b


@triton.jit
def _store_total(sums, total_a, total_b, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    a = tl.arange(0, WIDE)
    tl.store(sums + a, tl.sum(total_a, 0), mask=a < D)
    if REST:
        b = WIDE + tl.arange(0, REST)
        tl.store(sums + b, tl.sum(total_b, 0), mask=b < D)


@triton.jit
def _heads_backward_kernel(
    x, w0, w1, d0, d1, d2, dx, sums, rows, tiles, eps,
    D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    total0_a, total1_a = tl.zeros([TILE, WIDE], tl.float32), tl.zeros([TILE, WIDE], tl.float32)
    total0_b, total1_b = tl.zeros([TILE, REST if REST else 1], tl.float32), tl.zeros([TILE, REST if REST else 1], tl.float32)
    for tile in range(tiles):
        row = ((tl.program_id(0).to(tl.int64) * tiles + tile) * TILE + tl.arange(0, TILE))[:, None]
        live = row < rows
        total0_a, total0_b = _head_backward(x, w0, d0, dx, total0_a, total0_b, row, live, eps, D, WIDE, REST, PARTS * D, NORMED > 0)
        if PARTS > 1:
            total1_a, total1_b = _head_backward(x + D, w1, d1, dx + D, total1_a, total1_b, row, live, eps, D, WIDE, REST, PARTS * D, NORMED > 1)
        if PARTS > 2:
            _head_backward(x + 2 * D, w1, d2, dx + 2 * D, total1_a, total1_b, row, live, eps, D, WIDE, REST, PARTS * D, False)
    here = sums + tl.program_id(0) * NORMED * D
    _store_total(here, total0_a, total0_b, D, WIDE, REST)
    if NORMED > 1:
        _store_total(here + D, total1_a, total1_b, D, WIDE, REST)


def _three(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None, None][:3]


@torch.library.custom_op("dfmspec::heads", mutates_args=())
def heads(x: Tensor, weights: list[Tensor], parts: int, width: int, eps: float) -> list[Tensor]:
    """[t, h parts d] -> `parts` (1 to 3) tensors [t, h, d], each contiguous; the first ones normed by RMSNorm with `weights` (1 or 2 of [d])."""
    x = x.contiguous()
    shape = (x.size(0), x.size(1) // (parts * width), width)
    outputs = [x.new_empty(shape) for _ in range(parts)]
    rows, (wide, rest) = shape[0] * shape[1], _blocks(width)
    _heads_kernel[(triton.cdiv(rows, _FORWARD_TILE),)](
        x, *_three(weights)[:2], *_three(outputs), rows, eps, D=width, WIDE=wide, REST=rest, PARTS=parts, NORMED=len(weights),
        TILE=_FORWARD_TILE, num_warps=_FORWARD_WARPS,
    )  # fmt: skip
    return outputs


@heads.register_fake
def _(x, weights, parts, width, eps):  # type: ignore[no-untyped-def]
    return [x.new_empty(x.size(0), x.size(1) // (parts * width), width) for _ in range(parts)]


@torch.library.custom_op("dfmspec::heads_backward", mutates_args=())
def heads_backward(x: Tensor, weights: list[Tensor], d_outs: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """(dx [t, h parts d], the weights' gradients [number of weights, d] in fp32)."""
    x, d_outs = x.contiguous(), [d_out.contiguous() for d_out in d_outs]
    parts, width = len(d_outs), d_outs[0].size(-1)
    rows, (wide, rest) = d_outs[0].numel() // width, _blocks(width)
    tiles = triton.cdiv(rows, _TILE * _PROGRAMS)
    programs = triton.cdiv(rows, _TILE * tiles)
    dx, sums = torch.empty_like(x), x.new_empty(programs, len(weights), width, dtype=torch.float32)
    _heads_backward_kernel[(programs,)](
        x, *_three(weights)[:2], *_three(d_outs), dx, sums, rows, tiles, eps, D=width, WIDE=wide, REST=rest, PARTS=parts,
        NORMED=len(weights), TILE=_TILE, num_warps=_WARPS,
    )  # fmt: skip
    return dx, sums.sum(0)


@heads_backward.register_fake
def _(x, weights, d_outs, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(len(weights), d_outs[0].size(-1), dtype=torch.float32)


def _keep_heads(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weights, _parts, _width, ctx.eps = inputs
    ctx.save_for_backward(x, *weights)


def _heads_gradients(ctx, d_outs):  # type: ignore[no-untyped-def]
    x, *weights = ctx.saved_tensors
    dx, d_weights = heads_backward(x, weights, d_outs, ctx.eps)
    return dx, [d.to(weight.dtype) for d, weight in zip(d_weights, weights, strict=True)], None, None, None


heads.register_autograd(_heads_gradients, setup_context=_keep_heads)
