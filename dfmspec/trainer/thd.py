"""cuDNN's fused attention over packed sequences, through Transformer Engine, as an operator that torch.compile sees through.

Transformer Engine's own module chooses a back end in Python at every call and stops torch.compile; a block of the DiT
calls attention twice, so the choice is made once, here. Shapes: t tokens, h heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd, fused_attn_fwd

_BACKEND = FusedAttnBackend["F16_arbitrary_seqlen"]


@torch.library.custom_op("dfmspec::thd_attention", mutates_args=())
def thd_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [tq, h, d], k and v [tk, h, d] -> output [tq, h, d], softmax statistics [tq, h, 1], state of the (unused) dropout."""
    out, aux = fused_attn_fwd(
        True, max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q.contiguous(), k.contiguous(), v.contiguous(), q.dtype, _BACKEND,
        cu_seqlens_q_padded=cu_seqlens_q, cu_seqlens_kv_padded=cu_seqlens_kv,
        qkv_layout="thd_thd_thd", o_format="thd", attn_mask_type="padding",
    )  # fmt: skip
    statistics, rng_state = aux
    return out, statistics, rng_state


@thd_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 1, dtype=torch.float32), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("dfmspec::thd_attention_backward", mutates_args=())
def thd_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, rng_state: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor,
    max_seqlen_q: int, max_seqlen_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    dq, dk, dv, *_ = fused_attn_bwd(
        max_seqlen_q, max_seqlen_kv, cu_seqlens_q, cu_seqlens_kv, q.contiguous(), k.contiguous(), v.contiguous(), out, d_out.contiguous(),
        q.dtype, [statistics, rng_state], _BACKEND, cu_seqlens_q_padded=cu_seqlens_q, cu_seqlens_kv_padded=cu_seqlens_kv,
        qkv_layout="thd_thd_thd", o_format="thd", do_format="thd", dqkv_layout="thd_thd_thd", attn_mask_type="padding",
    )  # fmt: skip
    return dq, dk, dv


@thd_attention_backward.register_fake
def _(d_out, q, k, v, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens_q, cu_seqlens_kv, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_kv)


def _gradients(ctx, d_out, _d_statistics, _d_rng_state):  # type: ignore[no-untyped-def]
    return *thd_attention_backward(d_out, *ctx.saved_tensors, *ctx.how), None, None, None, None


thd_attention.register_autograd(_gradients, setup_context=_keep)
