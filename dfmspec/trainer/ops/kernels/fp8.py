"""Into FP8 (`trainer/ops/fp8.py`): the amax, then the cast and its transpose, of a matrix, of its GELU or of a gradient through one.

The first pass goes from the end to the beginning, so that the second finds some of it in the cache (both together 1 to 7 %
faster on an H100, with the tiles that casts had then). It writes a gradient through a GELU down, which is no more to move
than reading both its parts twice. (Cast where it is computed from two loads, its transpose was wrong: Triton 3.6 exchanges
8-bit values between threads wrongly. `tests/gpu` compares the two.)
"""

# ruff: noqa: N803 (constants of a kernel are in capitals, as Triton has them)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfmspec.trainer.ops.amax import MAX_SCALE
from dfmspec.trainer.ops.kernels.amax import as_bits, bits, new_amax, raise_amax_to

PLAIN, GELU, GELU_BACKWARD = range(3)
"""What is cast: x; gelu(x); the gradient x through gelu(h)."""
_BLOCK = 8192
"""Values of one program that looks for the amax."""
_TILE, _WARPS = 64, 8
"""Of the cast: rows and columns of a program."""


@triton.jit
def _tanh(x):
    """The processor's own, to 2^-11, as quack-kernels has it in bf16: exp and a division would take longer than memory."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _value(x, h, HOW: tl.constexpr):
    """fp32; GELU by tanh, as its users have it."""
    if HOW == 0:
        return x
    at = x if HOW == 1 else h
    tanh = _tanh(0.7978845608028654 * (at + 0.044715 * at * at * at))
    if HOW == 1:
        return 0.5 * at * (1 + tanh)
    return x * (0.5 * (1 + tanh) + 0.5 * at * (1 - tanh * tanh) * 0.7978845608028654 * (1 + 3 * 0.044715 * at * at))


@triton.jit
def _amax_kernel(x, h, through, amax, size, HOW: tl.constexpr, BLOCK: tl.constexpr):
    block = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    found = tl.zeros([BLOCK // 8], tl.int32)
    for part in tl.static_range(8):
        at = block * BLOCK + part * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        live = at < size
        value = tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        value = _value(value, tl.load(h + at, mask=live, other=0.0).to(tl.float32) if HOW == 2 else value, HOW)
        if HOW == 2:
            rounded = value.to(through.dtype.element_ty)
            tl.store(through + at, rounded, mask=live)
            value = rounded.to(tl.float32)
        found = tl.maximum(found, bits(value))
    raise_amax_to(amax, tl.max(found, 0))


@triton.jit
def _cast_kernel(
    x, amax, rows, columns, scale_inv, T, K, MAX_SCALE: tl.constexpr, HOW: tl.constexpr, E5M2: tl.constexpr, GIVEN: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    fp8_max: tl.constexpr = 57344.0 if E5M2 else 448.0
    kind: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
    t = (tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    k = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[None, :]
    live = (t < T) & (k < K)
    bound = tl.load(amax)
    scale = tl.where(bound == 0, 1.0, tl.div_rn(tl.full([], fp8_max, tl.float32), bound))  # exact: where values lie between two, it decides
    scale = tl.where(scale > MAX_SCALE, MAX_SCALE, scale)
    value = tl.load(x + t * K + k, mask=live, other=0.0).to(tl.float32)
    value = _value(value, value, HOW)
    if GIVEN:
        value = tl.where(tl.abs(value) > bound, float("nan"), value)
    value = tl.clamp(value * scale, -fp8_max, fp8_max, propagate_nan=tl.PropagateNan.ALL).to(kind)
    tl.store(rows + t * K + k, value, mask=live)
    tl.store(columns + tl.trans(k) * T + tl.trans(t), tl.trans(value), mask=tl.trans(live))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scale_inv, tl.div_rn(tl.full([], 1.0, tl.float32), scale))


@torch.library.custom_op("dfmspec::quantize", mutates_args=())
def quantize(x: Tensor, h: Tensor | None, amax: Tensor | None, how: int, e5m2: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x and, for GELU_BACKWARD, h [t, k] -> in FP8 (E5M2, or E4M3) [t, k], its transpose [k, t], and [] fp32: what to multiply both by.

    `amax`: [] fp32, of a PLAIN x, where it is known; a value beyond it becomes NaN.
    """
    x, h = x.contiguous(), None if h is None else h.contiguous()
    through = None if h is None else torch.empty_like(x)
    (t, k), dtype = x.shape, torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    rows, columns = x.new_empty(t, k, dtype=dtype), x.new_empty(k, t, dtype=dtype)
    scale_inv, given = x.new_empty((), dtype=torch.float32), amax is not None
    if amax is None:
        amax = new_amax(x)
        _amax_kernel[(triton.cdiv(t * k, _BLOCK),)](x, h, through, as_bits(amax), t * k, HOW=how, BLOCK=_BLOCK, num_warps=4)
    if through is not None:
        x, how = through, PLAIN
    grid = (triton.cdiv(k, _TILE), triton.cdiv(t, _TILE))
    _cast_kernel[grid](x, amax, rows, columns, scale_inv, t, k, MAX_SCALE=MAX_SCALE, HOW=how, E5M2=e5m2, GIVEN=given, TILE=_TILE, num_warps=_WARPS)
    return rows, columns, scale_inv


@quantize.register_fake
def _(x, h, amax, how, e5m2):  # type: ignore[no-untyped-def]
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.size(1), x.size(0), dtype=dtype), x.new_empty((), dtype=torch.float32)
