"""FP8 GEMMs with current scaling: each tensor is scaled by its own amax, now, so that it fills the format.

E4M3 forward and E5M2 for gradients ("hybrid"; Micikevicius et al. 2022, arXiv 2209.05433). Weights, their gradients,
sums and everything outside the GEMMs stay as they are. Hopper multiplies FP8 rows by rows only, so a tensor is cast
once and laid down twice, as it is and transposed. Where adaLN or the heads made it, its amax comes along (`amax.py`).
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

from dfmspec.trainer.ops.amax import E4M3, E5M2, MAX_SCALE, WithAmax, amax_of
from dfmspec.trainer.ops.buffers import accumulate, buffer_of


class Quantized(NamedTuple):
    """A matrix in FP8."""

    rows: Tensor
    """[t, k] as it is."""
    columns: Tensor
    """[k, t] its transpose."""
    scale_inv: Tensor
    """[] what to multiply both by to have the values back."""


def quantized(
    x: Tensor,
    dtype: torch.dtype,
    *,
    amax: Tensor | None = None,
    gelu: bool = False,
    through_gelu_of: Tensor | None = None,
) -> Quantized:
    """x [t, k], or gelu(x), or the gradient x through gelu(h), in FP8; what is not finite makes all of it so.

    `amax`: of x, where it is known; a value beyond it becomes NaN, so that an amax of something else does not pass
    unseen. `through_gelu_of`: h [t, k].

    Raises:
        ValueError: an amax of x, where something else is made of it.
    """
    if amax is not None and (gelu or through_gelu_of is not None):
        raise ValueError("the largest value of x is not that of its GELU, or of a gradient through one")

    # One kernel for all of it.
    if x.is_cuda:
        from dfmspec.trainer.ops.kernels.fp8 import GELU, GELU_BACKWARD, PLAIN, quantize

        if gelu:
            how = GELU
        elif through_gelu_of is not None:
            how = GELU_BACKWARD
        else:
            how = PLAIN
        return Quantized(*quantize(x, through_gelu_of, amax, how, dtype == E5M2))

    # What is cast, and its amax.
    if gelu:
        x = F.gelu(x, approximate="tanh")
    if through_gelu_of is not None:
        x = torch.ops.aten.gelu_backward(x, through_gelu_of, approximate="tanh")
    if amax is None:
        amax = amax_of(x)
    else:
        x = torch.where(x.abs() > amax, torch.nan, x)

    # A number / tensor would be a multiplication by an inverse, rounded twice.
    fp8_max = torch.finfo(dtype).max
    scale = torch.full_like(amax, fp8_max) / amax
    scale = torch.where(amax == 0, 1.0, scale)
    scale = torch.where(scale > MAX_SCALE, MAX_SCALE, scale)

    # The cast.
    scaled = x.float() * scale
    rows = scaled.clamp(-fp8_max, fp8_max).to(dtype)
    return Quantized(rows, rows.t().contiguous(), scale.reciprocal())


def _gemm(
    a: Tensor,
    b: Tensor,
    a_scale_inv: Tensor,
    b_scale_inv: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Tensor:
    """[m, k], [n, k] -> a b^T, [m, n].

    `fast` sums within the tensor cores' own precision, which is enough for activations.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_scale_inv, b_scale_inv, out_dtype=dtype, use_fast_accum=fast)
    a = a.float() * a_scale_inv
    b = b.float() * b_scale_inv
    return (a @ b.t()).to(dtype)


@torch.library.custom_op("dfmspec::fp8_weight_gradient", mutates_args=())
def weight_gradient(d_out: Tensor, x: Tensor, d_out_scale_inv: Tensor, x_scale_inv: Tensor, weight: Tensor) -> Tensor:
    """d_out^T x, of d_out^T [n, t] and x^T [k, t] in FP8, into its buffer [n, k]; what is returned then stands for it.

    Without a buffer, the gradient is returned. Why the buffer is no argument: see `gemm.weight_gradient`.
    """
    total, replace = buffer_of(weight)
    if total is None:
        return _gemm(d_out, x, d_out_scale_inv, x_scale_inv, weight.dtype)
    if replace and x.is_cuda:
        torch._scaled_mm(d_out, x.t(), d_out_scale_inv, x_scale_inv, out_dtype=total.dtype, out=total)
    else:
        part = _gemm(d_out, x, d_out_scale_inv, x_scale_inv, total.dtype)
        accumulate(total, part, replace=replace)
    return torch.empty_like(weight)


@weight_gradient.register_fake
def _(d_out: Tensor, x: Tensor, d_out_scale_inv: Tensor, x_scale_inv: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


class _Linear(torch.autograd.Function):
    """x weight^T, and, where the amax of its gradient is wanted, what stands for its own amax.

    The gradient of the latter is the amax of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor | None, weight: Tensor, wants_gradient_amax: bool
    ) -> tuple[Tensor, Tensor | None]:
        q = quantized(x, E4M3, amax=amax)
        w = quantized(weight, E4M3)
        ctx.save_for_backward(q.columns, q.scale_inv, w.columns, w.scale_inv, weight)
        output = _gemm(q.rows, w.rows, q.scale_inv, w.scale_inv, x.dtype, fast=True)
        output_amax = torch.empty_like(q.scale_inv) if wants_gradient_amax else None
        return output, output_amax

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_amax: Tensor | None) -> tuple[Tensor | None, ...]:
        x, x_scale_inv, w, w_scale_inv, weight = ctx.saved_tensors
        d = quantized(d_out, E5M2, amax=d_amax)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _gemm(d.rows, w, d.scale_inv, w_scale_inv, d_out.dtype)
        d_weight = weight_gradient(d.columns, x, d.scale_inv, x_scale_inv, weight)
        return d_x, None, d_weight, None


class _Mlp(torch.autograd.Function):
    """gelu(x first^T) second^T, and what stands for its amax, as `_Linear` has it.

    The GELU is never written down in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, amax: Tensor | None, first: Tensor, second: Tensor, wants_gradient_amax: bool
    ) -> tuple[Tensor, Tensor | None]:
        q = quantized(x, E4M3, amax=amax)
        w1 = quantized(first, E4M3)
        w2 = quantized(second, E4M3)
        h = _gemm(q.rows, w1.rows, q.scale_inv, w1.scale_inv, x.dtype, fast=True)  # [t, f]
        a = quantized(h, E4M3, gelu=True)
        ctx.save_for_backward(
            q.columns,
            q.scale_inv,
            w1.columns,
            w1.scale_inv,
            h,
            a.columns,
            a.scale_inv,
            w2.columns,
            w2.scale_inv,
            first,
            second,
        )
        output = _gemm(a.rows, w2.rows, a.scale_inv, w2.scale_inv, x.dtype, fast=True)
        output_amax = torch.empty_like(a.scale_inv) if wants_gradient_amax else None
        return output, output_amax

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_amax: Tensor | None) -> tuple[Tensor | None, ...]:
        x, x_scale_inv, w1, w1_scale_inv, h, a, a_scale_inv, w2, w2_scale_inv, first, second = ctx.saved_tensors
        d = quantized(d_out, E5M2, amax=d_amax)
        d_a = _gemm(d.rows, w2, d.scale_inv, w2_scale_inv, d_out.dtype)
        d_h = quantized(d_a, E5M2, through_gelu_of=h)
        d_x = _gemm(d_h.rows, w1, d_h.scale_inv, w1_scale_inv, d_out.dtype)
        d_first = weight_gradient(d_h.columns, x, d_h.scale_inv, x_scale_inv, first)
        d_second = weight_gradient(d.columns, a, d.scale_inv, a_scale_inv, second)
        return d_x, None, d_first, d_second, None


def linear(x: WithAmax, weight: Tensor, *, wants_gradient_amax: bool) -> WithAmax:
    """[t, k], [n, k] -> x weight^T, [t, n]; all sides multiples of FP8_ALIGNMENT.

    `wants_gradient_amax`: whoever takes the output gives its amax a gradient too.
    """
    return WithAmax(*_Linear.apply(x.values, x.amax, weight, wants_gradient_amax))


def mlp(x: WithAmax, first: Tensor, second: Tensor, *, wants_gradient_amax: bool) -> WithAmax:
    """[t, k], [f, k], [n, f] -> gelu(x first^T) second^T, [t, n]; all sides multiples of FP8_ALIGNMENT.

    `wants_gradient_amax`: whoever takes the output gives its amax a gradient too.
    """
    return WithAmax(*_Mlp.apply(x.values, x.amax, first, second, wants_gradient_amax))


def project(layer: nn.Module, x: WithAmax) -> WithAmax:
    """x through one of megatron-core's linear layers without bias, or of the FP8 layers here: [t, k] -> [t, n]."""
    if isinstance(layer, (Fp8ColumnParallelLinear, Fp8RowParallelLinear)):
        return layer(x)
    return WithAmax(layer(x.values)[0])


def _entered(layer: ColumnParallelLinear, x: WithAmax) -> WithAmax:
    """What this tensor-parallel rank multiplies; each scales it for itself."""
    if layer.sequence_parallel:
        return WithAmax(gather_from_sequence_parallel_region(x.values, group=layer.tp_group))
    if not layer.allreduce_dgrad:
        return x
    values = copy_to_tensor_model_parallel_region(x.values, group=layer.tp_group)
    return x._replace(values=values)


def _left(layer: RowParallelLinear, parts: WithAmax) -> WithAmax:
    """The sum of the ranks' parts; every part's gradient is that of the sum."""
    if layer.sequence_parallel:
        return WithAmax(reduce_scatter_to_sequence_parallel_region(parts.values, group=layer.tp_group))
    values = reduce_from_tensor_model_parallel_region(parts.values, group=layer.tp_group)
    return parts._replace(values=values)


class Fp8ColumnParallelLinear(ColumnParallelLinear):
    """Megatron's ColumnParallelLinear without bias, its GEMM in FP8; to be called through `project`."""

    sums_itself = True

    def forward(self, x: WithAmax) -> WithAmax:
        """[t, k] -> this rank's columns of x weight^T, [t, n / TP]"""
        return linear(_entered(self, x), self.weight, wants_gradient_amax=True)


class Fp8RowParallelLinear(RowParallelLinear):
    """Megatron's RowParallelLinear without bias, its GEMM in FP8; to be called through `project`.

    The ranks' parts are summed as they are.
    """

    sums_itself = True

    def forward(self, x: WithAmax) -> WithAmax:
        """This rank's columns of x, [t, k / TP] -> x weight^T, [t, n]"""
        parts = linear(x, self.weight, wants_gradient_amax=not self.sequence_parallel)
        return _left(self, parts)


def fp8_mlp(layer: MLP, hidden_states: WithAmax) -> WithAmax:
    """What Megatron's MLP of the two FP8 layers and a GELU gives: [s, D] -> [s, D]"""
    first = layer.linear_fc1
    second = layer.linear_fc2
    x = _entered(first, hidden_states)
    parts = mlp(x, first.weight, second.weight, wants_gradient_amax=not second.sequence_parallel)
    return _left(second, parts)
