"""FP8 matrix products with current scaling: each tensor is scaled by its own largest value, now, so that it fills the format.

E4M3 forward and E5M2 for gradients ("hybrid"; Micikevicius et al. 2022, arXiv 2209.05433). Weights, their gradients, sums
and everything outside the products stay as they are. Hopper multiplies FP8 rows by rows only, so a tensor is cast once
and laid down twice, as it is and transposed. Where adaLN or the heads made it, its largest value comes along (`measured.py`).
Shapes: t tokens, k, f and n the widths of a layer's input, middle and output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn

from dfmspec.trainer.ops.amax import E4M3, E5M2, MOST_SCALE, Measured, largest_of
from dfmspec.trainer.ops.buffers import accumulate, buffer_of


class Quantized(NamedTuple):
    """A matrix in FP8."""

    rows: Tensor
    """[t, k] as it is."""
    columns: Tensor
    """[k, t] its transpose."""
    inverse: Tensor
    """[] what to multiply both by to have the values back."""


def quantized(
    x: Tensor, dtype: torch.dtype, *, largest: Tensor | None = None, gelu: bool = False, through_gelu_of: Tensor | None = None
) -> Quantized:  # fmt: skip
    """x [t, k], or gelu(x), or the gradient x through gelu(h), in FP8; what is not finite makes all of it so.

    `largest`: of x, where it is known; a value beyond it becomes NaN, so that a number of something else does not pass unseen.

    Raises:
        ValueError: a largest value of x, where something else is made of it.
    """
    if largest is not None and (gelu or through_gelu_of is not None):
        raise ValueError("the largest value of x is not that of its GELU, or of a gradient through one")
    if x.is_cuda:
        from dfmspec.trainer.ops.kernels.fp8 import GELU, GELU_BACKWARD, PLAIN, quantize

        how = GELU if gelu else PLAIN if through_gelu_of is None else GELU_BACKWARD
        return Quantized(*quantize(x, through_gelu_of, largest, how, dtype == E5M2))
    if gelu:
        x = F.gelu(x, approximate="tanh")
    if through_gelu_of is not None:
        x = torch.ops.aten.gelu_backward(x, through_gelu_of, approximate="tanh")
    if largest is None:
        largest = largest_of(x)
    else:
        x = torch.where(x.abs() > largest, torch.nan, x)
    most = torch.finfo(dtype).max
    scale = torch.where(largest == 0, 1.0, torch.full_like(largest, most) / largest)  # a number / tensor is a product with an inverse, rounded twice
    scale = torch.where(scale > MOST_SCALE, MOST_SCALE, scale)
    rows = (x.float() * scale).clamp(-most, most).to(dtype)
    return Quantized(rows, rows.t().contiguous(), scale.reciprocal())


def _product(a: Tensor, b: Tensor, a_inverse: Tensor, b_inverse: Tensor, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """[m, k], [n, k] -> a b^T, [m, n]. `fast` sums within the tensor cores' own precision, which is enough for activations."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_inverse, b_inverse, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() * a_inverse) @ (b.float() * b_inverse).t()).to(dtype)


@torch.library.custom_op("dfmspec::fp8_weight_gradient", mutates_args=())
def weight_gradient(d_out: Tensor, x: Tensor, d_out_inverse: Tensor, x_inverse: Tensor, weight: Tensor) -> Tensor:
    """`products.weight_gradient` of d_out^T [n, t] and x^T [k, t] in FP8."""
    total, replace = buffer_of(weight)
    if total is None:
        return _product(d_out, x, d_out_inverse, x_inverse, weight.dtype)
    if replace and x.is_cuda:
        torch._scaled_mm(d_out, x.t(), d_out_inverse, x_inverse, out_dtype=total.dtype, out=total)
    else:
        accumulate(total, _product(d_out, x, d_out_inverse, x_inverse, total.dtype), replace=replace)
    return torch.empty_like(weight)


@weight_gradient.register_fake
def _(d_out, x, d_out_inverse, x_inverse, weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight)


class _Linear(torch.autograd.Function):
    """x weight^T; and, where its gradient will be `measured`, what stands for its largest value, whose gradient is that of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor | None, weight: Tensor, measured: bool) -> tuple[Tensor, Tensor | None]:
        q, w = quantized(x, E4M3, largest=largest), quantized(weight, E4M3)
        ctx.save_for_backward(q.columns, q.inverse, w.columns, w.inverse, weight)
        return _product(q.rows, w.rows, q.inverse, w.inverse, x.dtype, fast=True), torch.empty_like(q.inverse) if measured else None

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_largest: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_inverse, w, w_inverse, weight = ctx.saved_tensors
        d, wanted = quantized(d_out, E5M2, largest=d_largest), ctx.needs_input_grad[0]
        d_x = _product(d.rows, w, d.inverse, w_inverse, d_out.dtype) if wanted else None
        return d_x, None, weight_gradient(d.columns, x, d.inverse, x_inverse, weight), None


class _Mlp(torch.autograd.Function):
    """gelu(x first^T) second^T, and what stands for its largest value, as above; the GELU is never written down in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: Tensor | None, first: Tensor, second: Tensor, measured: bool) -> tuple[Tensor, Tensor | None]:
        q, w1, w2 = quantized(x, E4M3, largest=largest), quantized(first, E4M3), quantized(second, E4M3)
        h = _product(q.rows, w1.rows, q.inverse, w1.inverse, x.dtype, fast=True)  # [t, f]
        a = quantized(h, E4M3, gelu=True)
        ctx.save_for_backward(q.columns, q.inverse, w1.columns, w1.inverse, h, a.columns, a.inverse, w2.columns, w2.inverse, first, second)
        return _product(a.rows, w2.rows, a.inverse, w2.inverse, x.dtype, fast=True), torch.empty_like(a.inverse) if measured else None

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_largest: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, x_inverse, w1, w1_inverse, h, a, a_inverse, w2, w2_inverse, first, second = ctx.saved_tensors
        kind, d = d_out.dtype, quantized(d_out, E5M2, largest=d_largest)
        d_h = quantized(_product(d.rows, w2, d.inverse, w2_inverse, kind), E5M2, through_gelu_of=h)
        return (
            _product(d_h.rows, w1, d_h.inverse, w1_inverse, kind),
            None,
            weight_gradient(d_h.columns, x, d_h.inverse, x_inverse, first),
            weight_gradient(d.columns, a, d.inverse, a_inverse, second),
            None,
        )


def linear(x: Measured, weight: Tensor, *, gradient_measured: bool) -> Measured:
    """[t, k], [n, k] -> x weight^T, [t, n]; all sides multiples of FP8_ALIGNMENT.

    `gradient_measured`: whoever takes the output gives its number a gradient too.
    """
    return Measured(*_Linear.apply(*x, weight, gradient_measured))


def mlp(x: Measured, first: Tensor, second: Tensor, *, gradient_measured: bool) -> Measured:
    """[t, k], [f, k], [n, f] -> gelu(x first^T) second^T, [t, n]; as `linear`."""
    return Measured(*_Mlp.apply(*x, first, second, gradient_measured))


def project(layer: nn.Module, x: Measured) -> Measured:
    """x through one of megatron-core's linear layers without bias, or of those below."""
    if isinstance(layer, (Fp8ColumnParallelLinear, Fp8RowParallelLinear)):
        return layer(x)  # type: ignore[no-any-return]
    return Measured(layer(x.values)[0])


def _entered(layer: ColumnParallelLinear, x: Measured) -> Measured:
    """What this tensor-parallel rank multiplies; each scales it for itself."""
    if layer.sequence_parallel:
        return Measured(gather_from_sequence_parallel_region(x.values, group=layer.tp_group))
    return x._replace(values=copy_to_tensor_model_parallel_region(x.values, group=layer.tp_group)) if layer.allreduce_dgrad else x


def _left(layer: RowParallelLinear, parts: Measured) -> Measured:
    """The sum of the ranks' parts; every part's gradient is that of the sum."""
    if layer.sequence_parallel:
        return Measured(reduce_scatter_to_sequence_parallel_region(parts.values, group=layer.tp_group))
    return parts._replace(values=reduce_from_tensor_model_parallel_region(parts.values, group=layer.tp_group))


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's, without bias, its product in FP8; to be called through `project`."""

    sums_itself = True

    def forward(self, x: Measured) -> Measured:  # type: ignore[override]
        return linear(_entered(self, x), self.weight, gradient_measured=True)


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's, without bias, its product in FP8; the ranks' parts are summed as they are. To be called through `project`."""

    sums_itself = True

    def forward(self, x: Measured) -> Measured:  # type: ignore[override]
        return _left(self, linear(x, self.weight, gradient_measured=not self.sequence_parallel))


def fp8_mlp(layer: MLP, hidden_states: Measured) -> Measured:
    """What Megatron's MLP of the two layers above and a GELU gives: [s, D] -> [s, D]"""
    first, second = layer.linear_fc1, layer.linear_fc2
    return _left(second, mlp(_entered(first, hidden_states), first.weight, second.weight, gradient_measured=not second.sequence_parallel))
