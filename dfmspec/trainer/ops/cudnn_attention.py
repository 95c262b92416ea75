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


def _how(equal: int) -> dict[str, Any]:
    """Transformer Engine's words for a batch of equal segments, and for packed ones (THD)."""
    if equal:
        return {"qkv_layout": "bshd_bshd_bshd", "o_format": "bshd", "attn_mask_type": "no_mask"}
    return {"qkv_layout": "thd_thd_thd", "o_format": "thd", "attn_mask_type": "padding"}


@torch.library.custom_op("dfmspec::fused_attention", mutates_args=())
def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int, equal: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [tq, h, d], k and v [tk, h, d] -> output [tq, h, d], softmax statistics, state of the (unused) dropout.

    `equal`: the number of segments, if all have the same queries and keys, for which cuDNN is faster; otherwise 0.
    """
    if equal:
        max_seqlen_q, max_seqlen_kv = len(q) // equal, len(k) // equal
    out, aux = fused_attn_fwd(
        True, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, *laid(equal, q, k, v), q.dtype, _BACKEND,
        **({} if equal else {"cu_seqlens_q_padded": cu_seqlens_q, "cu_seqlens_kv_padded": cu_seqlens_kv}), **_how(equal),
    )  # fmt: skip
    statistics, rng_state = aux
    return out.view(q.shape), statistics, rng_state


@fused_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, equal):  # type: ignore[no-untyped-def]
    shape = (equal, q.size(1), q.size(0) // equal, 1) if equal else (*q.shape[:2], 1)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("dfmspec::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, rng_state: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor,
    max_seqlen_q: int, max_seqlen_kv: int, equal: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    if equal:
        max_seqlen_q, max_seqlen_kv = len(q) // equal, len(k) // equal
    how = _how(equal)
    dq, dk, dv, *_ = fused_attn_bwd(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, *laid(equal, q, k, v, out, d_out), q.dtype, [statistics, rng_state], _BACKEND,
        **({} if equal else {"cu_seqlens_q_padded": cu_seqlens_q, "cu_seqlens_kv_padded": cu_seqlens_kv}),
        **how, do_format=how["o_format"], dqkv_layout=how["qkv_layout"],
    )  # fmt: skip
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


fused_attention_backward.register_fake(fake_gradients)


def _gradients(ctx, d_out, _d_statistics, _d_rng_state):  # type: ignore[no-untyped-def]
    return *fused_attention_backward(d_out, *ctx.saved_tensors, *ctx.how), None, None, None, None, None


fused_attention.register_autograd(_gradients, setup_context=keep)
