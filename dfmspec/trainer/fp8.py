"""FP8 matrix products with current scaling: each tensor is scaled by its own largest value, now, so that it fills the format.

E4M3 forward and E5M2 for gradients ("hybrid"; Micikevicius et al. 2022, arXiv 2209.05433). Weights, their gradients, sums
and everything outside the products stay as they are. Hopper multiplies FP8 rows by rows only, so a tensor is cast once
and laid down twice, as it is and transposed. Shapes: t tokens, k and n the widths of a layer's input and output.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16
"""Every side of an FP8 product is a multiple of it."""


class Quantized:
    """A matrix in FP8: `rows` as it is, `columns` its transpose, and what to multiply both by to have the values back."""

    def __init__(self, x: Tensor, dtype: torch.dtype) -> None:
        largest, most = x.abs().amax().float(), torch.finfo(dtype).max
        scale = torch.where(largest > 0, most / largest, 1.0)  # not finite: the products are not either, and the update leaves the weights alone
        self.rows, self.columns = _cast(x, scale, dtype)
        self.inverse = scale.reciprocal()


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[t, k] -> [t, k] and [k, t] of x scale."""
    if x.is_cuda:
        from dfmspec.trainer.kernels.fp8 import cast

        return cast(x, scale, dtype == E5M2)
    most = torch.finfo(dtype).max
    rows = (x.float() * scale).clamp(-most, most).to(dtype)
    return rows, rows.t().contiguous()


def _product(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """[m, k], [n, k] -> a b^T, [m, n]. `fast` sums within the tensor cores' own precision, which is enough for activations."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_inverse, b_inverse, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() * a_inverse) @ (b.float() * b_inverse).t()).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        q, w = Quantized(x, E4M3), Quantized(weight, E4M3)
        ctx.save_for_backward(q.columns, q.inverse, w.columns, w.inverse)
        return _product(q.rows, w.rows, q.inverse, w.inverse, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        x, x_inverse, weight, weight_inverse = ctx.saved_tensors
        d, wanted = Quantized(d_out, E5M2), ctx.needs_input_grad[0]
        d_x = _product(d.rows, weight, d.inverse, weight_inverse, d_out.dtype, fast=False) if wanted else None
        return d_x, _product(d.columns, x, d.inverse, x_inverse, d_out.dtype, fast=False)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., k], [n, k] -> x weight^T, [..., n], of the types of x; all sides multiples of ALIGNMENT."""
    output: Tensor = _Linear.apply(x.reshape(-1, x.size(-1)), weight)
    return output.view(*x.shape[:-1], -1)


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's, without bias, its product in FP8; each rank scales what it multiplies."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool, **_: Any) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return linear(input, weight)


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's, without bias, its product in FP8; the ranks' parts are summed as they are."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return linear(input, weight)
