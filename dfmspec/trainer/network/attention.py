"""Self-attention and cross-attention inside the segments of a pack (THD).

The projections are megatron-core's; the core is ours, with three back ends: cuDNN's fused attention through Transformer
Engine, FlashAttention 4, or `scaled_dot_product_attention` for each run of equal segments. Shapes: t tokens, h heads of
this rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import ge
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules, SelfAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfmspec.spec.limits import FLASH_HEADS
from dfmspec.trainer.data.segments import Pairs
from dfmspec.trainer.ops.amax import WithAmax, with_gradient_amax
from dfmspec.trainer.ops.fp8 import project
from dfmspec.trainer.ops.libraries import FLASH_ATTENTION, usable

_REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
_FASTEST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_LONG = (1024, 512)
"""(queries, keys): shorter segments go to cuDNN as packed ones, though they are equal.

cuDNN 9.19's backward pass of a batch of short ones does not survive a CUDA graph (NaN, or illegal addresses, at 64 and
256 tokens; right at 1,024), through torch's attention or Transformer Engine's.
"""


def backend_of(config: TransformerConfig) -> Literal["flash", "fused", "torch"]:
    """Who computes attention: FlashAttention 4, cuDNN ("fused"), or torch.

    The first two take segments of any lengths in one call, and read on the device where they lie.
    """
    if config.transformer_impl != "transformer_engine" or config.params_dtype == torch.float32:
        return "torch"
    if config.attention_backend == AttnBackend.flash:
        return "flash"
    may_be_flash = config.attention_backend == AttnBackend.auto and config.kv_channels in FLASH_HEADS
    if may_be_flash and usable(FLASH_ATTENTION):
        return "flash"
    return "torch" if config.deterministic_mode else "fused"


class PackedAttention(nn.Module):
    """softmax(q k / sqrt(d)) v inside each segment."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.backend = backend_of(config)
        self.deterministic = config.deterministic_mode

    def forward(self, query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> Tensor:
        """query [tq, h, d], key and value [tk, h, d] -> [tq, h, d]"""
        where = (pairs.cu_seqlens_q, pairs.cu_seqlens_kv, pairs.max_seqlen_q, pairs.max_seqlen_kv)

        # One call, whatever the lengths.
        if self.backend == "flash":
            from dfmspec.trainer.ops.flash_attention import flash_attention

            output, _ = flash_attention(query, key, value, *where, pairs.uniform, self.deterministic)
            return output
        if self.backend == "fused":
            from dfmspec.trainer.ops.cudnn_attention import fused_attention

            are_a_batch = pairs.uniform and all(map(ge, pairs.lengths[0], _LONG))
            equal = pairs.uniform if are_a_batch else 0
            output, _, _ = fused_attention(query, key, value, *where, equal)
            return output

        # A call for each run of equal segments.
        if pairs.uniform:
            return self._batched(query, key, value, pairs.uniform)
        outputs = []
        for q, k, count in _runs(pairs.lengths):
            output = self._batched(query[q], key[k], value[k], count)
            outputs.append(output)
        return torch.cat(outputs)

    def _batched(self, query: Tensor, key: Tensor, value: Tensor, count: int) -> Tensor:
        """`count` segments of equal lengths: query [count q, h, d], key and value [count k, h, d] -> [count q, h, d]"""
        backends = _REPEATABLE if self.deterministic else _FASTEST
        with sdpa_kernel(backends, set_priority=True):
            output = F.scaled_dot_product_attention(
                _as_batch(query, count),
                _as_batch(key, count),
                _as_batch(value, count),
            )
        return output.transpose(1, 2).flatten(0, 1)


def _as_batch(x: Tensor, count: int) -> Tensor:
    """[count s, h, d] -> [count, h, s, d]"""
    segments = x.reshape(count, -1, *x.shape[1:])
    return segments.transpose(1, 2)


def _runs(lengths: tuple[tuple[int, int], ...]) -> Iterator[tuple[slice, slice, int]]:
    """Neighbouring segments of one shape, taken together: their query rows, their key rows, how many they are."""
    q = 0
    k = 0
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop < len(lengths) and lengths[stop] == lengths[start]:
            continue
        count = stop - start
        queries, keys = lengths[start]
        q_end = q + count * queries
        k_end = k + count * keys
        if queries:  # an empty padding segment has no queries
            yield slice(q, q_end), slice(k, k_end), count
        q = q_end
        k = k_end
        start = stop


class RMSNorm(nn.Module):
    """RMSNorm over the channels of a head, the weight shared by all heads; DFM's q/k norm."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device="cuda")
        self.weight = nn.Parameter(ones)
        self.sums_itself = self.weight.is_cuda  # in `ops/kernels/heads.py`


def heads(projection: WithAmax, norms: list[RMSNorm], parts: int) -> list[Tensor]:
    """[t, h parts d] -> `parts` tensors [t, h, d], the first of them normed over their channels."""
    width = norms[0].weight.size(0)
    eps = norms[0].eps
    weights = [norm.weight for norm in norms]
    if projection.values.is_cuda:
        from dfmspec.trainer.ops.kernels.heads import heads as fused

        return fused(projection.values, weights, parts, width, eps, projection.amax)

    x = with_gradient_amax(projection)
    by_head = x.view(len(x), -1, parts, width)
    pieces = list(by_head.unbind(2))
    for index, weight in enumerate(weights):
        pieces[index] = F.rms_norm(pieces[index], (width,), weight, eps)
    return pieces


class PackedSelfAttention(SelfAttention):
    """Megatron's SelfAttention, without the caches, rotary positions and masks that a DiT has no use for."""

    def forward(self, hidden_states: WithAmax, pairs: Pairs) -> WithAmax:
        """Attention of the tokens to those of their own segment: [t, D] of this tensor-parallel rank -> [t, D]."""
        mixed = project(self.linear_qkv, hidden_states)  # [t, h 3 d]
        q, k, v = heads(mixed, [self.q_layernorm, self.k_layernorm], 3)
        if self.config.context_parallel_size > 1:
            mine = torch.cat([k, v], dim=-1)
            whole = gather_from_sequence_parallel_region(mine, group=self.pg_collection.cp)
            first, end = pairs.keys
            k, v = whole[first:end].chunk(2, dim=-1)
        y = self.core_attention(q, k, v, pairs).flatten(1)
        return project(self.linear_proj, WithAmax(y))


class PackedCrossAttention(CrossAttention):
    """Megatron's CrossAttention to a text of its own width, with DFM's RMSNorm on each head of q and k."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        *args: Any,
        crossattn_emb_size: int,
        **kwargs: Any,
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
        width = self.hidden_size_per_attention_head
        self.q_layernorm = RMSNorm(width, config, config.layernorm_epsilon)
        self.k_layernorm = RMSNorm(width, config, config.layernorm_epsilon)

    def forward(self, hidden_states: WithAmax, context: Tensor, pairs: Pairs) -> WithAmax:
        """[t, D] and the text [c, E], of this tensor-parallel rank -> [t, D]"""
        query = project(self.linear_q, hidden_states)  # [t, h d]
        mixed = project(self.linear_kv, WithAmax(context))  # [c, h 2 d]
        (q,) = heads(query, [self.q_layernorm], 1)
        k, v = heads(mixed, [self.k_layernorm], 2)
        if self.config.context_parallel_size > 1:
            first, end = pairs.keys
            k = k[first:end]
            v = v[first:end]
        y = self.core_attention(q, k, v, pairs).flatten(1)
        return project(self.linear_proj, WithAmax(y))
