"""What the operators of both fused attentions share (`fused.py`, `flash.py`). Shapes: t tokens, h heads, d channels of a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def laid(equal: int, *tensors: Tensor) -> list[Tensor]:
    """[t, h, d] as a batch of `equal` segments [n, s, h, d], or, of packed segments (0), as they are; contiguous."""
    return [x.contiguous().view(equal, -1, *x.shape[1:]) if equal else x.contiguous() for x in tensors]


def fake_gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass gives, for the compiler: of the shapes of q, k and v."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For the backward pass: q, k, v, all that came out, where the segments lie, and in `ctx.how` the rest."""
    q, k, v, cu_seqlens_q, cu_seqlens_kv, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_kv)
