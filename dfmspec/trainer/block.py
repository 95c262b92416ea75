"""One block of the DiT: self-attention, cross-attention to the text, MLP, each modulated by the noise level (adaLN).

The parts are megatron-core's; what is ours is the order in which they are called, and the modulation. Shapes: s tokens
on this rank, n segments, D hidden size, r rank of the LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from dfmspec.trainer.attention import NormedCrossAttention, PackedAttention, RMSNorm


@dataclass(frozen=True)
class Segments:
    """Where the segments of a microbatch lie; passed through TransformerBlock as its `packed_seq_params`."""

    self_attention: PackedSeqParams
    cross_attention: PackedSeqParams
    of_token: Tensor
    """[s] segment of each token on this rank."""


class AdaLN(nn.Module):
    """adaLN-LoRA: three (shift, scale, gate) for each segment from the embedding of its noise level.

    Under sequence parallelism a rank sees only its tokens, so these weights' gradients are partial there; marked
    `sequence_parallel`, they are summed over TP by megatron-core's `finalize_model_grads`.
    """

    def __init__(self, config: TransformerConfig, lora_rank: int) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        kind = {"bias": False, "dtype": config.params_dtype, "device": "cuda"}
        self.down = nn.Linear(config.hidden_size, lora_rank, **kind)
        self.up = nn.Linear(lora_rank, 9 * config.hidden_size, **kind)
        for weight in self.parameters():
            weight.sequence_parallel = config.sequence_parallel

    def forward(self, noise_embedding: Tensor) -> tuple[Tensor, ...]:
        """[n, D] -> nine of [n, D]: shift, scale, gate of self-attention, of cross-attention, of the MLP."""
        return self.up(self.down(F.silu(noise_embedding))).chunk(9, dim=-1)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor, segment: Tensor) -> Tensor:
        """[s, 1, D] -> [s, 1, D]: layer norm without weights, then the segment's scale and shift."""
        normed = F.layer_norm(x, (x.size(-1),), eps=self.eps)
        return normed * (1 + scale[segment].unsqueeze(1)) + shift[segment].unsqueeze(1)


class DiTLayer(TransformerLayer):
    """A TransformerLayer whose residual branches are modulated by the noise level.

    `attention_mask` carries the embedding of the noise level, [n, D]: it is the one tensor argument besides the context
    that TransformerBlock hands to every layer, and through recomputation, with its gradient.
    """

    def __init__(self, config: TransformerConfig, *args: Any, adaln_lora_rank: int, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.adaln = AdaLN(config, adaln_lora_rank)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, context: Tensor, packed_seq_params: Segments, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [s, 1, D], attention_mask [n, D], context [c, 1, E] -> hidden_states, context."""
        x, segment, modulate = hidden_states, packed_seq_params.of_token, self.adaln.modulate
        shift_sa, scale_sa, gate_sa, shift_ca, scale_ca, gate_ca, shift_mlp, scale_mlp, gate_mlp = self.adaln(attention_mask)

        y, _bias = self.self_attention(
            modulate(x, shift_sa, scale_sa, segment), None, packed_seq_params=packed_seq_params.self_attention
        )
        x = x + gate_sa[segment].unsqueeze(1) * y
        y, _bias = self.cross_attention(
            modulate(x, shift_ca, scale_ca, segment), None, key_value_states=context,
            packed_seq_params=packed_seq_params.cross_attention,
        )  # fmt: skip
        x = x + gate_ca[segment].unsqueeze(1) * y
        y, _bias = self.mlp(modulate(x, shift_mlp, scale_mlp, segment))
        return x + gate_mlp[segment].unsqueeze(1) * y, context


def layer_spec(config: TransformerConfig, *, adaln_lora_rank: int, crossattn_emb_size: int) -> ModuleSpec:
    """The parts of one block, for the back end that `config.transformer_impl` names."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear as column,
        )
        from megatron.core.extensions.transformer_engine import (
            TEDotProductAttention as core_attention,
        )
        from megatron.core.extensions.transformer_engine import (
            TERowParallelLinear as row,
        )
    else:
        column, row, core_attention = ColumnParallelLinear, RowParallelLinear, PackedAttention
    no_mask = {"attn_mask_type": AttnMaskType.no_mask}
    return ModuleSpec(
        module=DiTLayer,
        params={"adaln_lora_rank": adaln_lora_rank},
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params=no_mask,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=core_attention, linear_proj=row, q_layernorm=RMSNorm, k_layernorm=RMSNorm
                ),
            ),
            cross_attention=ModuleSpec(
                module=NormedCrossAttention,
                params=no_mask | {"crossattn_emb_size": crossattn_emb_size},
                submodules=CrossAttentionSubmodules(linear_q=column, linear_kv=column, core_attention=core_attention, linear_proj=row),
            ),
            self_attn_bda=IdentityOp,
            cross_attn_bda=IdentityOp,
            mlp_bda=IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        ),
    )
