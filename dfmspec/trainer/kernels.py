"""Triton kernels: adaLN (`modulation.py`), heads (`attention.py`), gradients and the optimizer. Imported only where there is a GPU.

Shapes: s tokens, n segments, D hidden size, k chunks of rows.
"""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfmspec.trainer.modulation import CHUNK

_WARPS = 4
_ROWS = 2
"""Rows of a chunk that are held at a time."""


@triton.jit
def _forward_kernel(
    x, y, gate, shift, scale, of_token, x_out, z, mean, rstd, D, gate_stride, shift_stride, scale_stride, eps,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
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
        tl.store(z + row * D + columns, (centred * r * (1 + a) + b).to(z.dtype.element_ty), mask=inside)
        tl.store(mean + row, m)
        tl.store(rstd + row, r)


@triton.jit
def _backward_kernel(
    x, y, gate, scale, chunks, mean, rstd, dx_out, dz, dx, dy, sums, D, gate_stride, scale_stride,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
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
    if RESIDUAL:
        g = tl.load(gate + segment * gate_stride + flat, mask=inside, other=0.0).to(tl.float32)[None, :]
    if NORM:
        a = 1 + tl.load(scale + segment * scale_stride + flat, mask=inside, other=0.0).to(tl.float32)[None, :]
    for i in range(0, CHUNK, TILE):
        row = (first + i + tl.arange(0, TILE))[:, None]
        at = row * D + columns
        live = (columns < D) & (row < end)
        dh = tl.zeros([TILE, BLOCK], tl.float32)
        if RESIDUAL:
            dh = tl.load(dx_out + at, mask=live, other=0.0).to(tl.float32)
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
            tl.store(dy + at, (dh * g).to(dy.dtype.element_ty), mask=live)
    here = sums + chunk * D * (RESIDUAL + 2 * NORM) + flat
    if RESIDUAL:
        tl.store(here, dgate, mask=inside)
    if NORM:
        tl.store(here + RESIDUAL * D, dshift, mask=inside)
        tl.store(here + (RESIDUAL + 1) * D, dscale, mask=inside)


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _rows_contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("dfmspec::adaln", mutates_args=())
def adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, of_token: Tensor, chunks: Tensor,
    members: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """With y and gate, x + gate y; with shift and scale, the modulated norm of that: (x_out, z, mean, rstd); empty where not asked for."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    gate, shift, scale = _rows_contiguous(gate), _rows_contiguous(shift), _rows_contiguous(scale)
    residual, norm, (s, width) = y is not None, shift is not None, x.shape
    x_out = torch.empty_like(x) if residual else x.new_empty(0)
    z = torch.empty_like(x) if norm else x.new_empty(0)
    mean, rstd = (x.new_empty(s if norm else 0, dtype=torch.float32) for _ in range(2))
    block = triton.next_power_of_2(width)
    _forward_kernel[(s,)](
        x, y, gate, shift, scale, of_token, x_out, z, mean, rstd, width, _stride(gate), _stride(shift), _stride(scale), eps,
        RESIDUAL=residual, NORM=norm, BLOCK=block, num_warps=_WARPS,
    )  # fmt: skip
    return x_out, z, mean, rstd


@adaln.register_fake
def _(x, y, gate, shift, scale, of_token, chunks, members, eps):  # type: ignore[no-untyped-def]
    rows = x.size(0) if shift is not None else 0
    x_out = torch.empty_like(x, memory_format=torch.contiguous_format) if y is not None else x.new_empty(0)
    z = torch.empty_like(x, memory_format=torch.contiguous_format) if shift is not None else x.new_empty(0)
    return x_out, z, x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("dfmspec::adaln_backward", mutates_args=())
def adaln_backward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, chunks: Tensor, members: Tensor, mean: Tensor, rstd: Tensor,
    dx_out: Tensor | None, dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dy, sums): dx is empty without a norm, when it is dx_out; sums [n, 1 to 3, D] fp32: dgate given y, then dshift and dscale given scale."""
    residual, norm, width = y is not None, scale is not None, x.size(1)
    dx_out = None if dx_out is None else dx_out.contiguous()
    dz = None if dz is None else dz.contiguous()
    gate, scale = _rows_contiguous(gate), _rows_contiguous(scale)
    dx = torch.empty_like(x) if norm else x.new_empty(0)
    dy = torch.empty_like(x) if residual else x.new_empty(0)
    parts = residual + 2 * norm
    sums = x.new_empty(len(chunks), parts * width, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _backward_kernel[(len(chunks),)](
        x, y, gate, scale, chunks, mean, rstd, dx_out, dz, dx, dy, sums, width, _stride(gate), _stride(scale),
        RESIDUAL=residual, NORM=norm, BLOCK=block, CHUNK=CHUNK, TILE=_ROWS, num_warps=_WARPS,
    )  # fmt: skip
    return dx, dy, (members @ sums).view(-1, parts, width)


@adaln_backward.register_fake
def _(x, y, gate, scale, chunks, members, mean, rstd, dx_out, dz):  # type: ignore[no-untyped-def]
    parts = (y is not None) + 2 * (scale is not None)
    dx, dy = (torch.empty_like(x) if wanted is not None else x.new_empty(0) for wanted in (scale, y))
    return dx, dy, members.new_empty(members.size(0), parts, x.size(1))


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, gate, _shift, scale, _of_token, chunks, members, _eps = inputs
    x_out, _z, mean, rstd = output
    ctx.save_for_backward(x_out if y is not None else x, y, gate, scale, chunks, members, mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dx_out, dz, _dmean, _drstd):  # type: ignore[no-untyped-def]
    x, y, gate, scale, chunks, members, mean, rstd = ctx.saved_tensors
    if y is not None and dx_out is None:
        dx_out = torch.zeros_like(x)
    if scale is not None and dz is None:
        dz = torch.zeros_like(x)
    dx, dy, sums = adaln_backward(x, y, gate, scale, chunks, members, mean, rstd, dx_out, dz)
    parts = [part.to(x.dtype) for part in sums.unbind(1)]
    dgate = parts.pop(0) if y is not None else None
    dshift, dscale = parts if scale is not None else (None, None)
    return dx if scale is not None else dx_out, dy if y is not None else None, dgate, dshift, dscale, None, None, None, None


adaln.register_autograd(_gradients, setup_context=_keep)


# Heads: q, k and v out of one projection, q and k normed. A row is one head of one token.

_TILE = 16
"""Rows that a program holds at a time."""
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
def _head_backward(x, weight, d_out, dx, total, row, columns, live, eps, D: tl.constexpr, STRIDE: tl.constexpr, NORMED: tl.constexpr):
    d = tl.load(d_out + row * D + columns, mask=live, other=0.0).to(tl.float32)
    if NORMED:
        value = tl.load(x + row * STRIDE + columns, mask=live, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        normed = value * r
        total += d * normed
        d *= tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        d = (d - normed * (tl.sum(d * normed, 1) / D)[:, None]) * r
    tl.store(dx + row * STRIDE + columns, d.to(dx.dtype.element_ty), mask=live)
    return total


@triton.jit
def _heads_backward_kernel(
    x, w0, w1, d0, d1, d2, dx, sums, rows, tiles, eps, D: tl.constexpr, PARTS: tl.constexpr, NORMED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    total0 = tl.zeros([TILE, BLOCK], tl.float32)
    total1 = tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(tiles):
        row = ((tl.program_id(0).to(tl.int64) * tiles + tile) * TILE + tl.arange(0, TILE))[:, None]
        live = (row < rows) & (columns < D)
        total0 = _head_backward(x, w0, d0, dx, total0, row, columns, live, eps, D, PARTS * D, NORMED > 0)
        if PARTS > 1:
            total1 = _head_backward(x + D, w1, d1, dx + D, total1, row, columns, live, eps, D, PARTS * D, NORMED > 1)
        if PARTS > 2:
            total1 = _head_backward(x + 2 * D, w1, d2, dx + 2 * D, total1, row, columns, live, eps, D, PARTS * D, False)
    at = tl.arange(0, BLOCK)
    here = sums + tl.program_id(0) * NORMED * D + at
    tl.store(here, tl.sum(total0, 0), mask=at < D)
    if NORMED > 1:
        tl.store(here + D, tl.sum(total1, 0), mask=at < D)


def _three(tensors: list[Tensor]) -> list[Tensor | None]:
    return [*tensors, None, None, None][:3]


@torch.library.custom_op("dfmspec::heads", mutates_args=())
def heads(x: Tensor, weights: list[Tensor], parts: int, width: int, eps: float) -> list[Tensor]:
    """[t, h parts d] -> `parts` (1 to 3) tensors [t, h, d], each contiguous; the first ones normed by RMSNorm with `weights` (1 or 2 of [d])."""
    x = x.contiguous()
    shape = (x.size(0), x.size(1) // (parts * width), width)
    outputs = [x.new_empty(shape) for _ in range(parts)]
    rows = shape[0] * shape[1]
    _heads_kernel[(triton.cdiv(rows, _TILE),)](
        x, *_three(weights)[:2], *_three(outputs), rows, eps, D=width, PARTS=parts, NORMED=len(weights),
        TILE=_TILE, BLOCK=triton.next_power_of_2(width), num_warps=4,
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
    rows = d_outs[0].numel() // width
    tiles = triton.cdiv(rows, _TILE * _PROGRAMS)
    programs = triton.cdiv(rows, _TILE * tiles)
    dx, sums = torch.empty_like(x), x.new_empty(programs, len(weights), width, dtype=torch.float32)
    _heads_backward_kernel[(programs,)](
        x, *_three(weights)[:2], *_three(d_outs), dx, sums, rows, tiles, eps, D=width, PARTS=parts, NORMED=len(weights),
        TILE=_TILE, BLOCK=triton.next_power_of_2(width), num_warps=8,
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


# Gradients into the buffer that is reduced.


@triton.jit
def _accumulate_kernel(total, part, fresh, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(total + at, mask=(at < size) & (tl.load(fresh) == 0), other=0.0).to(tl.float32)
    tl.store(total + at, before + tl.load(part + at, mask=at < size).to(tl.float32), mask=at < size)


def accumulate(total: Tensor, part: Tensor, fresh: Tensor) -> None:
    """total += part, in fp32; where `fresh` [1] is not 0, total = part."""
    size = part.numel()
    _accumulate_kernel[(triton.cdiv(size, 2048),)](total, part.contiguous(), fresh, size, BLOCK=2048, num_warps=4)


# The optimizer.

UPDATE_BLOCK = 2048
"""Values of one program of `update`."""


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
        blocks, norm, clip, lr, weight_decay, beta1, beta2, eps, 1 - beta1**step, 1 - beta2**step, WRITE=write, BLOCK=UPDATE_BLOCK, num_warps=4,
    )  # fmt: skip
