"""Core attention for packed (THD) sequences on `scaled_dot_product_attention`: the `local` back end.

Shapes: t tokens of all segments, h heads of this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class PackedAttention(nn.Module):
    """Attention inside each segment of a pack; a stand-in for megatron-core's DotProductAttention, which has no THD."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, /, *,
        packed_seq_params: PackedSeqParams, **_: Any,
    ) -> Tensor:  # fmt: skip
        """query [tq, h, d], key and value [tk, h, d] -> [tq, h, d]; `attention_mask` is not used: segments say it all."""
        outputs = []
        for q, k, count in _runs(packed_seq_params):
            batched = (
                x[rows].unflatten(0, (count, -1)).transpose(1, 2)  # [n, h, s, d]
                for x, rows in ((query, q), (key, k), (value, k))
            )
            outputs.append(F.scaled_dot_product_attention(*batched, scale=self.softmax_scale).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)


def _runs(packed: PackedSeqParams) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring segments of one shape, taken together: their query rows, their key rows, how many they are."""
    q, k = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_kv.tolist()
    lengths = [(q[i + 1] - q[i], k[i + 1] - k[i]) for i in range(len(q) - 1)]
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] != lengths[start]:
            if lengths[start][0]:  # an empty padding segment has no queries
                yield slice(q[start], q[stop]), slice(k[start], k[stop]), stop - start
            start = stop


class RMSNorm(nn.Module):
    """RMSNorm over the channels of a head, the weight shared by all heads; DFM's q/k norm."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device="cuda"))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]"""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class NormedCrossAttention(CrossAttention):
    """Megatron's CrossAttention to a text of its own width, with DFM's RMSNorm on each head of q and k."""

    def __init__(
        self, config: TransformerConfig, submodules: CrossAttentionSubmodules, *args: Any, crossattn_emb_size: int, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.linear_kv = submodules.linear_kv(
            crossattn_emb_size,
            2 * self.kv_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
        )
        norm = {"hidden_size": self.hidden_size_per_attention_head, "config": config, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(RMSNorm, **norm)
        self.k_layernorm = build_module(RMSNorm, **norm)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v: [t, 1, h, d]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.q_layernorm(query), self.k_layernorm(key), value
