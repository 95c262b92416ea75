"""Casts to FP8 (`trainer/fp8.py`)."""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 64


@triton.jit
def _cast_kernel(x, scale, rows, columns, T, K, x_stride, E5M2: tl.constexpr, TILE: tl.constexpr):
    most: tl.constexpr = 57344.0 if E5M2 else 448.0
    kind: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
    t = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    k = (tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE))[None, :]
    live = (t < T) & (k < K)
    value = tl.load(x + t * x_stride + k, mask=live, other=0.0).to(tl.float32) * tl.load(scale)
    value = tl.clamp(value, -most, most, propagate_nan=tl.PropagateNan.ALL).to(kind)
    tl.store(rows + t * K + k, value, mask=live)
    tl.store(columns + tl.trans(k) * T + tl.trans(t), tl.trans(value), mask=tl.trans(live))


@torch.library.custom_op("dfmspec::cast_fp8", mutates_args=())
def cast(x: Tensor, scale: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    """x [t, k], scale [] fp32 -> x scale in FP8 (E5M2, or E4M3) [t, k], and its transpose [k, t]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    (t, k), dtype = x.shape, torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    rows, columns = x.new_empty(t, k, dtype=dtype), x.new_empty(k, t, dtype=dtype)
    grid = (triton.cdiv(t, _TILE), triton.cdiv(k, _TILE))
    _cast_kernel[grid](x, scale, rows, columns, t, k, x.stride(0), E5M2=e5m2, TILE=_TILE, num_warps=4)
    return rows, columns


@cast.register_fake
def _(x, scale, e5m2):  # type: ignore[no-untyped-def]
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.size(1), x.size(0), dtype=dtype)
