"""cuDNN's fused attention over segments, through Transformer Engine, as an operator that torch.compile sees through.

Transformer Engine's own module chooses a back end in Python at every call and stops torch.compile; a block of the DiT
calls attention twice, so the choice is made once, here. Shapes: t tokens, h heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd

from dfmspec.trainer.ops.segmented import fake_gradients, keep, laid

_BACKEND = FusedAttnBackend["F16_arbitrary_seqlen"]


def _layout(equal: int) -> dict[str, Any]:
    """Transformer Engine's words for a batch of equal segments, and for packed ones (THD)."""
    if equal:
        return {"qkv_layout": "bshd_bshd_bshd", "o_format": "bshd", "attn_mask_type": "no_mask"}
    return {"qkv_layout": "thd_thd_thd", "o_format": "thd", "attn_mask_type": "padding"}


def _in_memory(equal: int, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor) -> dict[str, Tensor]:
    """Where packed segments start: one right behind the other; equal ones are a batch, which needs no words."""
    if equal:
        return {}
    return {"cu_seqlens_q_padded": cu_seqlens_q, "cu_seqlens_kv_padded": cu_seqlens_kv}


@torch.library.custom_op("dfmspec::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    equal: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [tq, h, d], k and v [tk, h, d] -> output [tq, h, d], softmax statistics, state of the (unused) dropout.

    `equal`: the number of segments, if all have the same queries and keys, for which cuDNN is faster; otherwise 0.
    """
    # Lengths of a batch are exact; of packed segments, upper bounds.
    if equal:
        max_seqlen_q = len(q) // equal
        max_seqlen_kv = len(k) // equal
    out, (statistics, rng_state) = fused_attn_fwd(
        True,  # training
        max_seqlen_q,
        max_seqlen_kv,
        cu_seqlens_q,
        cu_seqlens_kv,
        *laid(equal, q, k, v),
        q.dtype,
        _BACKEND,
        **_in_memory(equal, cu_seqlens_q, cu_seqlens_kv),
        **_layout(equal),
    )
    return out.view(q.shape), statistics, rng_state


@fused_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    equal: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, _ = q.shape
    shape = (equal, heads, tokens // equal, 1) if equal else (tokens, heads, 1)
    statistics = q.new_empty(shape, dtype=torch.float32)
    rng_state = q.new_empty(2, dtype=torch.int64)
    return q.new_empty(q.shape), statistics, rng_state


@torch.library.custom_op("dfmspec::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    rng_state: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    equal: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `fused_attention` took and gave: of their shapes."""
    # Lengths as forward.
    if equal:
        max_seqlen_q = len(q) // equal
        max_seqlen_kv = len(k) // equal

    # Gradients lie as q, k, v and the output do.
    layout = _layout(equal)
    dq, dk, dv, *_ = fused_attn_bwd(
        max_seqlen_q,
        max_seqlen_kv,
        cu_seqlens_q,
        cu_seqlens_kv,
        *laid(equal, q, k, v, out, d_out),
        q.dtype,
        [statistics, rng_state],
        _BACKEND,
        **_in_memory(equal, cu_seqlens_q, cu_seqlens_kv),
        **layout,
        do_format=layout["o_format"],
        dqkv_layout=layout["qkv_layout"],
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


fused_attention_backward.register_fake(fake_gradients)


def _gradients(ctx: Any, d_out: Tensor, _d_statistics: Tensor, _d_rng_state: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = fused_attention_backward(d_out, *ctx.saved_tensors, *ctx.how)
    return dq, dk, dv, None, None, None, None, None


fused_attention.register_autograd(_gradients, setup_context=keep)
