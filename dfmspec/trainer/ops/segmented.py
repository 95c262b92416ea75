"""What the operators of cuDNN's attention and of FlashAttention share (`cudnn_attention.py`, `flash_attention.py`).

Shapes: t tokens, h heads, d channels of a head; n segments of s tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def laid(equal: int, *tensors: Tensor) -> list[Tensor]:
    """[t, h, d] as a batch of `equal` segments [n, s, h, d], or, of packed segments (0), as they are; contiguous."""
    if not equal:
        return [x.contiguous() for x in tensors]
    return [x.contiguous().view(equal, -1, *x.shape[1:]) for x in tensors]


def fake_gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward pass gives, for the compiler: of the shapes of q, k and v."""
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    return dq, dk, dv


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For the backward pass: q, k, v, all that came out, where the segments lie, and in `ctx.how` the rest."""
    q, k, v, cu_seqlens_q, cu_seqlens_kv, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_kv)
