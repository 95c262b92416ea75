"""adaLN over packed segments (`trainer/network/modulation.py`). Shapes: s tokens, n segments, D hidden size, k chunks of rows."""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfmspec.trainer.data.segments import CHUNK
from dfmspec.trainer.ops.kernels.amax import as_bits, bits, new_amax, raise_amax_to

_FORWARD_WARPS, _WARPS = 4, 4
_ROWS = 2
"""Rows of a chunk that are held at a time."""
_STAGES = 3
"""Steps of the backward pass whose rows are on their way at a time."""
_SUMMED = (32, 64)
"""Chunks that a program sums at a time, and columns."""


@triton.jit
def _forward_kernel(
    x, y, gate, shift, scale, of_token, x_out, z, mean, rstd, amax, D, gate_stride, shift_stride, scale_stride, eps,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, AMAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    segment = tl.load(of_token + row).to(tl.int64)
    h = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        g = tl.load(gate + segment * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        h += g * tl.load(y + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(x_out.dtype.element_ty)
        tl.store(x_out + row * D + columns, rounded, mask=inside)
        h = rounded.to(tl.float32)  # what the backward pass will read
    if NORM:
        m = tl.sum(h, 0) / D
        centred = tl.where(inside, h - m, 0.0)
        r = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        a = tl.load(scale + segment * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(shift + segment * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
        modulated = (centred * r * (1 + a) + b).to(z.dtype.element_ty)
        tl.store(z + row * D + columns, modulated, mask=inside)
        tl.store(mean + row, m)
        tl.store(rstd + row, r)
        if AMAX:
            raise_amax_to(amax, tl.max(bits(modulated.to(tl.float32)), 0))


@triton.jit
def _backward_kernel(
    x, y, gate, scale, chunks, mean, rstd, dx_out, dz, dx, dy, sums, amax, D, gate_stride, scale_stride,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, AMAX: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of rows: their gradients, and the chunk's sums [dgate][dshift, dscale]. x is the residual stream after the gate."""
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.load(chunks + 3 * chunk).to(tl.int64)
    end = tl.load(chunks + 3 * chunk + 1).to(tl.int64)
    segment = tl.load(chunks + 3 * chunk + 2).to(tl.int64)
    flat = tl.arange(0, BLOCK)
    columns = flat[None, :]
    inside = flat < D
    dgate = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    dscale = tl.zeros([BLOCK], tl.float32)
    found = tl.zeros([BLOCK], tl.int32)
    if RESIDUAL:
        g = tl.load(gate + segment * gate_stride + flat, mask=inside, other=0.0).to(tl.float32)[None, :]
    if NORM:
        a = 1 + tl.load(scale + segment * scale_stride + flat, mask=inside, other=0.0).to(tl.float32)[None, :]
    for i in tl.range(0, CHUNK, TILE, num_stages=STAGES):
        row = (first + i + tl.arange(0, TILE))[:, None]
        at = row * D + columns
        live = (columns < D) & (row < end)
        dh = tl.load(dx_out + at, mask=live, other=0.0).to(tl.float32)
        if RESIDUAL:
            branch = tl.load(y + at, mask=live, other=0.0).to(tl.float32)
        if NORM:
            m = tl.load(mean + row, mask=row < end, other=0.0)
            r = tl.load(rstd + row, mask=row < end, other=0.0)
            h = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
            d = tl.load(dz + at, mask=live, other=0.0).to(tl.float32)
            normed = tl.where(live, (h - m) * r, 0.0)
            dshift += tl.sum(d, 0)
            dscale += tl.sum(d * normed, 0)
            d = d * a
            dh += (d - (tl.sum(d, 1) / D)[:, None] - normed * (tl.sum(d * normed, 1) / D)[:, None]) * r
            tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=live)
        if RESIDUAL:
            dgate += tl.sum(dh * branch, 0)
            through_gate = (dh * g).to(dy.dtype.element_ty)
            tl.store(dy + at, through_gate, mask=live)
            if AMAX:
                found = tl.maximum(found, tl.max(bits(through_gate.to(tl.float32)), 0))
    if AMAX:
        raise_amax_to(amax, tl.max(found, 0))
    here = sums + chunk * D * (RESIDUAL + 2 * NORM) + flat
    if RESIDUAL:
        tl.store(here, dgate, mask=inside)
    if NORM:
        tl.store(here + RESIDUAL * D, dshift, mask=inside)
        tl.store(here + (RESIDUAL + 1) * D, dscale, mask=inside)


@triton.jit
def _sum_kernel(sums, starts, totals, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The chunks of one segment, in their order."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    end = tl.load(starts + segment + 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.load(starts + segment), end, ROWS):
        chunk = (first + tl.arange(0, ROWS))[:, None]
        total += tl.load(sums + chunk.to(tl.int64) * width + columns, mask=(chunk < end) & (columns < width), other=0.0)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(totals + segment * width + at, tl.sum(total, 0), mask=at < width)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _rows_contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("dfmspec::adaln", mutates_args=())
def adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, of_token: Tensor, chunks: Tensor,
    starts: Tensor, eps: float, y_amax: Tensor | None, wants_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With y and gate, x + gate y; with shift and scale, the modulated norm of that: (x_out, z, mean, rstd, amax); empty where not asked for.

    amax is of z, where `wants_amax`. `y_amax` only stands for the amax of y, whose gradient is the amax of y's gradient.
    """
    x, y = x.contiguous(), None if y is None else y.contiguous()
    gate, shift, scale = _rows_contiguous(gate), _rows_contiguous(shift), _rows_contiguous(scale)
    residual, norm, (s, width) = y is not None, shift is not None, x.shape
    x_out = torch.empty_like(x) if residual else x.new_empty(0)
    z = torch.empty_like(x) if norm else x.new_empty(0)
    mean, rstd = (x.new_empty(s if norm else 0, dtype=torch.float32) for _ in range(2))
    amax = new_amax(x, wants_amax)
    block = triton.next_power_of_2(width)
    _forward_kernel[(s,)](
        x, y, gate, shift, scale, of_token, x_out, z, mean, rstd, as_bits(amax), width, _stride(gate), _stride(shift), _stride(scale), eps,
        RESIDUAL=residual, NORM=norm, AMAX=wants_amax, BLOCK=block, num_warps=_FORWARD_WARPS,
    )  # fmt: skip
    return x_out, z, mean, rstd, amax


@adaln.register_fake
def _(x, y, gate, shift, scale, of_token, chunks, starts, eps, y_amax, wants_amax):  # type: ignore[no-untyped-def]
    rows = x.size(0) if shift is not None else 0
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format) if y is not None else x.new_empty(0)
    z = torch.empty_like(x, memory_format=torch.contiguous_format) if shift is not None else x.new_empty(0)
    return x_out, z, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32), new_amax(x, wants_amax)


@torch.library.custom_op("dfmspec::adaln_backward", mutates_args=())
def adaln_backward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, chunks: Tensor, starts: Tensor, mean: Tensor, rstd: Tensor,
    dx_out: Tensor, dz: Tensor | None, wants_amax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dy, sums, amax): dx is empty without a norm, when it is dx_out; sums [n, 1 to 3, D] fp32: dgate given y, then dshift and dscale given
    scale; amax, where `wants_amax`: of dy.
    """
    residual, norm, width = y is not None, scale is not None, x.size(1)
    dx_out, dz = dx_out.contiguous(), None if dz is None else dz.contiguous()
    gate, scale = _rows_contiguous(gate), _rows_contiguous(scale)
    dx = torch.empty_like(x) if norm else x.new_empty(0)
    dy = torch.empty_like(x) if residual else x.new_empty(0)
    parts = residual + 2 * norm
    sums = x.new_empty(len(chunks), parts * width, dtype=torch.float32)
    amax, block = new_amax(x, wants_amax), triton.next_power_of_2(width)
    _backward_kernel[(len(chunks),)](
        x, y, gate, scale, chunks, mean, rstd, dx_out, dz, dx, dy, sums, as_bits(amax), width, _stride(gate), _stride(scale),
        RESIDUAL=residual, NORM=norm, AMAX=wants_amax, BLOCK=block, CHUNK=CHUNK, TILE=_ROWS, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip
    totals = x.new_empty(len(starts) - 1, parts, width, dtype=torch.float32)
    _sum_kernel[(len(totals), triton.cdiv(parts * width, _SUMMED[1]))](sums, starts, totals, parts * width, *_SUMMED, num_warps=4)
    return dx, dy, totals, amax


@adaln_backward.register_fake
def _(x, y, gate, scale, chunks, starts, mean, rstd, dx_out, dz, wants_amax):  # type: ignore[no-untyped-def]
    parts = (y is not None) + 2 * (scale is not None)
    dx, dy = (torch.empty_like(x) if wanted is not None else x.new_empty(0) for wanted in (scale, y))
    return dx, dy, x.new_empty(starts.size(0) - 1, parts, x.size(1), dtype=torch.float32), new_amax(x, wants_amax)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _x, y, gate, _shift, scale, _of_token, chunks, starts, _eps, y_amax, _wants_amax = inputs
    x_out, _z, mean, rstd, _amax = output
    ctx.wants_amax = y_amax is not None
    ctx.save_for_backward(x_out, y, gate, scale, chunks, starts, mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dx_out, dz, *_):  # type: ignore[no-untyped-def]
    """With y: without, both outputs' gradients meet in `modulation.modulate`."""
    x, y, gate, scale, chunks, starts, mean, rstd = ctx.saved_tensors
    dx_out = torch.zeros_like(x) if dx_out is None else dx_out
    if scale is not None and dz is None:
        dz = torch.zeros_like(x)
    dx, dy, sums, amax = adaln_backward(x, y, gate, scale, chunks, starts, mean, rstd, dx_out, dz, ctx.wants_amax)
    dgate, *others = sums.to(x.dtype).unbind(1)
    dshift, dscale = others or (None, None)
    return dx_out if scale is None else dx, dy, dgate, dshift, dscale, None, None, None, None, amax if ctx.wants_amax else None, None


adaln.register_autograd(_gradients, setup_context=_keep)
