"""GEMMs of a block whose backward pass writes a weight's gradient where it is summed, and an MLP with its GELU inside.

Sums are in fp32. megatron-core has the first as `gradient_accumulation_fusion`, for extensions that torch.compile does
not see through. Without tensor parallelism; with it the layers are megatron-core's. Shapes: t tokens, k, f and n the
widths of a layer's input, middle and output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dfmspec.trainer.ops.amax import WithAmax
from dfmspec.trainer.ops.buffers import buffer_of


@torch.library.custom_op("dfmspec::weight_gradient", mutates_args=())
def weight_gradient(d_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """d_out [t, n]^T x [t, k] into its buffer [n, k]; what is returned then only stands for it.

    Without a buffer, the gradient is returned. What it changes is no argument: the compiler refuses a backward pass
    that changes an input of the forward pass.
    """
    total, replace = buffer_of(weight)
    if total is None:
        return d_out.t() @ x

    # On a CPU a GEMM keeps its type.
    kind: dict[str, Any] = {}
    if not x.is_cuda:
        d_out = d_out.to(total.dtype)
        x = x.to(total.dtype)
    elif total.dtype != x.dtype:
        kind["out_dtype"] = total.dtype
    if replace:
        torch.mm(d_out.t(), x, **kind, out=total)
    else:
        torch.addmm(total, d_out.t(), x, **kind, out=total)
    return torch.empty_like(weight)


@weight_gradient.register_fake
def _(d_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(weight)


class _Linear(torch.autograd.Function):
    """x weight^T"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        d_x = d_out @ weight if ctx.needs_input_grad[0] else None
        return d_x, weight_gradient(d_out, x, weight)


@torch.library.custom_op("dfmspec::product_gelu", mutates_args=())
def gemm_gelu(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """h = x [t, k] weight [f, k]^T, and gelu(h), by one kernel: [t, f] both."""
    if not x.is_cuda:
        h = x @ weight.t()
        return h, F.gelu(h, approximate="tanh")
    from quack.gemm_interface import gemm_act

    h, a = gemm_act(x, weight.t(), activation="gelu_tanh_approx", tuned=False)
    return h, a


@gemm_gelu.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.size(0), weight.size(0))
    a = x.new_empty(x.size(0), weight.size(0))
    return h, a


@torch.library.custom_op("dfmspec::product_through_gelu", mutates_args=())
def gemm_dgelu(d_out: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient d_out [t, n] weight [n, f] through gelu(h), and gelu(h) once more, by one kernel: [t, f] both."""
    if not h.is_cuda:
        d_h = torch.ops.aten.gelu_backward(d_out @ weight, h, approximate="tanh")
        return d_h, F.gelu(h, approximate="tanh")
    from quack.gemm_interface import gemm_dact

    d_h, a = gemm_dact(d_out, weight, h, activation="gelu_tanh_approx", tuned=False)
    return d_h, a


@gemm_dgelu.register_fake
def _(d_out: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(h)


class _Mlp(torch.autograd.Function):
    """gelu(x first^T) second^T; the GELU is made again in the backward pass, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        h, a = gemm_gelu(x, first)
        ctx.save_for_backward(x, first, h, second)
        return a @ second.t()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, first, h, second = ctx.saved_tensors
        d_h, a = gemm_dgelu(d_out, second, h)
        d_x = d_h @ first
        d_first = weight_gradient(d_h, x, first)
        d_second = weight_gradient(d_out, a, second)
        return d_x, d_first, d_second


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[t, k], [n, k] -> x weight^T, [t, n]"""
    return _Linear.apply(x, weight)


def mlp(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[t, k], [f, k], [n, f] -> gelu(x first^T) second^T, [t, n]"""
    return _Mlp.apply(x, first, second)


class _OwnGemm:
    """Makes a layer's GEMM ours where no other rank has a part of it."""

    config: TransformerConfig
    tp_group: Any

    @property
    def sums_itself(self) -> bool:
        """Whether the layer writes its weight's gradient into its buffer; asked by `gradients.into_buffers`."""
        return self.config.tensor_model_parallel_size == 1

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if self.sums_itself:
            return linear(input, weight)
        # RowParallelLinear forgets its group and warns: a warning ends torch.compile's trace.
        options["tp_group"] = self.tp_group
        return super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]


class ColumnLinear(_OwnGemm, ColumnParallelLinear):
    """Megatron's ColumnParallelLinear without bias, its GEMM ours without tensor parallelism."""


class RowLinear(_OwnGemm, RowParallelLinear):
    """Megatron's RowParallelLinear without bias, its GEMM ours without tensor parallelism."""


def fused_mlp(layer: MLP, hidden_states: WithAmax) -> WithAmax:
    """What Megatron's MLP of two linear layers and a GELU gives, without tensor parallelism: [s, D] -> [s, D]"""
    first = layer.linear_fc1.weight
    second = layer.linear_fc2.weight
    return WithAmax(mlp(hidden_states.values, first, second))
