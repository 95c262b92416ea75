"""One block of the DiT: self-attention, cross-attention to the text, MLP, each modulated by the noise level (adaLN).

The parts are megatron-core's; what is ours is the order in which they are called, and the modulation. Shapes: s tokens
on this rank, n segments, D hidden size, r rank of the LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttentionSubmodules, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from dfmspec.trainer.data.segments import Segments
from dfmspec.trainer.network.attention import PackedAttention, PackedCrossAttention, PackedSelfAttention, RMSNorm
from dfmspec.trainer.network.modulation import gated, gated_modulate, modulate
from dfmspec.trainer.ops.amax import WithAmax
from dfmspec.trainer.ops.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, fp8_mlp
from dfmspec.trainer.ops.gemm import ColumnLinear, RowLinear, fused_mlp, linear
from dfmspec.trainer.ops.libraries import QUACK, usable


class AdaLN(nn.Module):
    """adaLN-LoRA: three (shift, scale, gate) for each segment from the embedding of its noise level.

    Under sequence parallelism a rank sees only its tokens, so these weights' gradients are partial there; marked
    `sequence_parallel`, they are summed over TP by megatron-core's `finalize_model_grads`.
    """

    def __init__(self, config: TransformerConfig, lora_rank: int) -> None:
        super().__init__()
        kind: dict[str, Any] = {"bias": False, "dtype": config.params_dtype, "device": "cuda"}
        self.down = nn.Linear(config.hidden_size, lora_rank, **kind)
        self.up = nn.Linear(lora_rank, 9 * config.hidden_size, **kind)
        for layer in (self.down, self.up):
            layer.weight.sequence_parallel = config.sequence_parallel
            layer.sums_itself = True

    def forward(self, noise_embedding: Tensor) -> tuple[Tensor, ...]:
        """[n, D] -> nine of [n, D]: shift, scale, gate of self-attention, of cross-attention, of the MLP."""
        x = F.silu(noise_embedding)
        x = linear(x, self.down.weight)  # [n, r]
        x = linear(x, self.up.weight)  # [n, 9 D]
        return x.chunk(9, dim=-1)


class DiTLayer(TransformerLayer):
    """A TransformerLayer whose residual branches are modulated by the noise level.

    `attention_mask` carries the embedding of the noise level, [n, D]: it is the one tensor argument besides the context
    that TransformerBlock hands to every layer, and through recomputation, with its gradient.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        adaln_lora_rank: int,
        mlp_of: Callable[[MLP, WithAmax], WithAmax],
        wants_amax: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.adaln = AdaLN(config, adaln_lora_rank)
        self.mlp_of = mlp_of
        self.wants_amax = wants_amax

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        context: Tensor,
        packed_seq_params: Segments,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [s, 1, D], attention_mask [n, D], context [c, 1, E] -> hidden_states, context."""
        tp = self.config.tensor_model_parallel_size
        cp = self.config.context_parallel_size
        is_compiled = hidden_states.is_cuda and tp == 1 and cp == 1
        block = _compiled_block if is_compiled else _block
        return block(self, hidden_states, attention_mask, context, packed_seq_params), context


def _block(
    layer: DiTLayer, hidden_states: Tensor, noise_embedding: Tensor, context: Tensor, segments: Segments
) -> Tensor:
    """[s, 1, D], [n, D], [c, 1, E] -> [s, 1, D]; inside, no axis of one."""
    x = hidden_states.squeeze(1)  # [s, D]
    modulations = layer.adaln(noise_embedding)
    shift_sa, scale_sa, gate_sa = modulations[0:3]
    shift_ca, scale_ca, gate_ca = modulations[3:6]
    shift_mlp, scale_mlp, gate_mlp = modulations[6:9]
    rows = segments.rows
    eps = layer.config.layernorm_epsilon
    wants_amax = layer.wants_amax

    # x: the residual stream; z, y: input and output of a branch.
    x, z = modulate(x, shift_sa, scale_sa, rows, eps, wants_amax=wants_amax)
    y = layer.self_attention(z, segments.self_attention)
    x, z = gated_modulate(x, y, gate_sa, shift_ca, scale_ca, rows, eps, wants_amax=wants_amax)
    y = layer.cross_attention(z, context.squeeze(1), segments.cross_attention)
    x, z = gated_modulate(x, y, gate_ca, shift_mlp, scale_mlp, rows, eps, wants_amax=wants_amax)
    y = layer.mlp_of(layer.mlp, z)
    return gated(x, y, gate_mlp, rows).unsqueeze(1)


_compiled_block = torch.compile(_block)


def _megatrons_mlp(layer: MLP, hidden_states: WithAmax) -> WithAmax:
    return WithAmax(layer(hidden_states.values)[0])


def layer_spec(config: TransformerConfig, *, adaln_lora_rank: int, crossattn_emb_size: int, fp8: bool) -> ModuleSpec:
    """The parts of one block; `fp8`: the GEMMs of its attentions and its MLP in FP8."""
    # Our linear layers, and what calls those of the MLP.
    gelu_inside = config.tensor_model_parallel_size == 1 and config.params_dtype == torch.bfloat16 and usable(QUACK)
    column: type[ColumnParallelLinear]
    row: type[RowParallelLinear]
    if fp8:
        column = Fp8ColumnParallelLinear
        row = Fp8RowParallelLinear
        mlp_of = fp8_mlp
    else:
        column = ColumnLinear
        row = RowLinear
        mlp_of = fused_mlp if gelu_inside else _megatrons_mlp

    # megatron-core's parts, around them.
    no_mask = {"attn_mask_type": AttnMaskType.no_mask}
    self_attention = ModuleSpec(
        module=PackedSelfAttention,
        params=no_mask,
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=PackedAttention,
            linear_proj=row,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    cross_attention = ModuleSpec(
        module=PackedCrossAttention,
        params=no_mask | {"crossattn_emb_size": crossattn_emb_size},
        submodules=CrossAttentionSubmodules(
            linear_q=column,
            linear_kv=column,
            core_attention=PackedAttention,
            linear_proj=row,
        ),
    )
    return ModuleSpec(
        module=DiTLayer,
        params={
            "adaln_lora_rank": adaln_lora_rank,
            "mlp_of": mlp_of,
            "wants_amax": fp8 and not config.sequence_parallel,
        },
        submodules=TransformerLayerSubmodules(
            self_attention=self_attention,
            cross_attention=cross_attention,
            self_attn_bda=IdentityOp,
            cross_attn_bda=IdentityOp,
            mlp_bda=IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        ),
    )
