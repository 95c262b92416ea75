"""Matrix products of a block whose backward pass writes a weight's gradient where it is summed, in fp32, and of an MLP with its GELU inside.

megatron-core has the first as `gradient_accumulation_fusion`, for extensions that torch.compile does not see through.
Without tensor parallelism; with it the layers are megatron-core's. Shapes: t tokens, k, f and n the widths of a layer's
input, middle and output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor


@dataclass
class Incoming:
    """How gradients meet their buffers; the weights of one model share it as `weight.incoming`."""

    replace: bool = False
    """A gradient takes the place of what its buffer holds, where it would be added."""


@torch.library.custom_op("dfmspec::weight_gradient", mutates_args=())
def weight_gradient(d_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """d_out [t, n]^T x [t, k] into `weight.main_grad` [n, k]; what is returned then only stands for it. Without such a buffer, the gradient.

    What it changes is no argument: the compiler refuses a backward pass that changes an input of the forward pass.
    """
    incoming = getattr(weight, "incoming", None)
    if incoming is None:
        return d_out.t() @ x
    total, kind = weight.main_grad, {} if weight.main_grad.dtype == x.dtype else {"out_dtype": weight.main_grad.dtype}
    if not x.is_cuda:  # there a product keeps its type
        d_out, x, kind = d_out.to(total.dtype), x.to(total.dtype), {}
    if incoming.replace:
        torch.mm(d_out.t(), x, **kind, out=total)
    else:
        torch.addmm(total, d_out.t(), x, **kind, out=total)
    weight.grad_added_to_main_grad = True  # DDP's hook has nothing to add
    return torch.empty_like(weight)


@weight_gradient.register_fake
def _(d_out, x, weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(weight)


class _Linear(torch.autograd.Function):
    """x weight^T"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        d_x = d_out @ weight if ctx.needs_input_grad[0] else None
        return d_x, weight_gradient(d_out, x, weight)


@torch.library.custom_op("dfmspec::product_gelu", mutates_args=())
def product_gelu(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """h = x [t, k] weight [f, k]^T, and gelu(h), by one kernel: [t, f] both."""
    if not x.is_cuda:
        h = x @ weight.t()
        return h, F.gelu(h, approximate="tanh")
    from quack.gemm_interface import gemm_act

    h, a = gemm_act(x, weight.t(), activation="gelu_tanh_approx", tuned=False)
    return h, a


@product_gelu.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty(x.size(0), weight.size(0)), x.new_empty(x.size(0), weight.size(0))


@torch.library.custom_op("dfmspec::product_through_gelu", mutates_args=())
def product_through_gelu(d_out: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient d_out [t, n] weight [n, f] through gelu(h), and gelu(h) once more, by one kernel: [t, f] both."""
    if not h.is_cuda:
        return torch.ops.aten.gelu_backward(d_out @ weight, h, approximate="tanh"), F.gelu(h, approximate="tanh")
    from quack.gemm_interface import gemm_dact

    d_h, a = gemm_dact(d_out, weight, h, activation="gelu_tanh_approx", tuned=False)
    return d_h, a


@product_through_gelu.register_fake
def _(d_out, weight, h):  # type: ignore[no-untyped-def]
    return torch.empty_like(h), torch.empty_like(h)


class _Mlp(torch.autograd.Function):
    """gelu(x first^T) second^T; the GELU is made again in the backward pass, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        h, a = product_gelu(x, first)
        ctx.save_for_backward(x, first, h, second)
        return a @ second.t()

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, first, h, second = ctx.saved_tensors
        d_h, a = product_through_gelu(d_out, second, h)
        return d_h @ first, weight_gradient(d_h, x, first), weight_gradient(d_out, a, second)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., k], [n, k] -> x weight^T, [..., n]"""
    output: Tensor = _Linear.apply(x.reshape(-1, x.size(-1)), weight)
    return output.view(*x.shape[:-1], -1)


def mlp(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[..., k], [f, k], [n, f] -> gelu(x first^T) second^T, [..., n]"""
    output: Tensor = _Mlp.apply(x.reshape(-1, x.size(-1)), first, second)
    return output.view(*x.shape[:-1], -1)


class ColumnLinear(ColumnParallelLinear):
    """Megatron's, without bias; its product is ours where no other rank has a part of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alone = self.weight.sums_itself = self.tp_group.size() == 1

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        output: Tensor = linear(input, weight) if self.alone else super()._forward_impl(input=input, weight=weight, **options)
        return output


class RowLinear(RowParallelLinear):
    """The same. Megatron's forgets its group on the way to the product and warns of it: a warning ends torch.compile's trace."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alone = self.weight.sums_itself = self.tp_group.size() == 1

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        options["tp_group"] = self.tp_group
        output: Tensor = linear(input, weight) if self.alone else super()._forward_impl(input=input, weight=weight, **options)
        return output


def fused_mlp(layer: MLP, hidden_states: Tensor) -> Tensor:
    """What Megatron's MLP of the two layers above and a GELU gives: [s, 1, D] -> [s, 1, D]"""
    return mlp(hidden_states, layer.linear_fc1.weight, layer.linear_fc2.weight)
