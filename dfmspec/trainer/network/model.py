"""The diffusion transformer: DFM's DiT (dfm/src/megatron/model/dit/dit_model.py) on megatron-core's TransformerBlock.

Differences from DFM, each with its reason, are in docs/deviations.md. Shapes: s tokens of a microbatch, n segments
(packed samples, then those of padding), c text tokens, P = C pt p p values of a patch, D hidden size, E text width.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.microbatch import Microbatch
from dfmspec.trainer.network.block import layer_spec
from dfmspec.trainer.network.embeddings import NoiseEmbedding, PositionEmbedding, axis_sizes
from dfmspec.trainer.noise import counter_seed

_SAME_NAMES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "num_query_groups",
    "layernorm_epsilon",
    "init_method_std",
    "qk_layernorm",
    "transformer_impl",
    "deterministic_mode",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)
"""Keys of `model` that are fields of megatron-core's TransformerConfig, name and value."""


def transformer_config(experiment: Experiment) -> TransformerConfig:
    """Megatron's own configuration of the model.

    Raises:
        ValueError, AssertionError: in Megatron's words, what it refuses of a model.
    """
    model = experiment.model
    bf16 = experiment.mixed_precision.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    interleaved = model.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        **{name: getattr(model, name) for name in _SAME_NAMES},
        attention_backend=AttnBackend[model.attention_backend],
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=False,
        # Batched sends mix up two messages between the same two ranks, as with PP = 2.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The mean over all tokens of the global batch, however it is cut.
        calculate_per_token_loss=True,
        # On a CPU too, values come from `initialize`.
        use_cpu_initialization=experiment.cluster.device == "cpu",
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


class DiT(MegatronModule):
    """The layers of one pipeline stage, with the patch embedding on the first and the projection on the last."""

    def __init__(
        self,
        experiment: Experiment,
        config: TransformerConfig,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config)
        model = experiment.model
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = False
        patch_size = model.in_channels * model.patch_temporal * model.patch_spatial**2
        kind: dict[str, Any] = {"dtype": config.params_dtype, "device": "cuda"}

        # The parts, each where its pipeline stage has it.
        if pre_process:
            self.x_embedder = nn.Linear(patch_size, config.hidden_size, **kind)
            sizes = axis_sizes(
                model.max_frames, model.max_img_h, model.max_img_w, model.patch_temporal, model.patch_spatial
            )
            self.position_embedding = PositionEmbedding(config.hidden_size, sizes)
        self.noise_embedding = NoiseEmbedding(config)
        block = layer_spec(
            config,
            adaln_lora_rank=model.adaln_lora_rank,
            crossattn_emb_size=model.crossattn_emb_size,
            fp8=experiment.mixed_precision.fp8 is not None,
        )
        self.decoder = TransformerBlock(config, block, pre_process=pre_process, post_process=False, vp_stage=vp_stage)
        if post_process:
            self.final_linear = nn.Linear(config.hidden_size, patch_size, **kind)

        # The noise embedding stands on every pipeline stage, and is kept equal: see `optim/gradients.py`.
        on_first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        for weight in self.noise_embedding.parameters():
            weight.sequence_parallel = config.sequence_parallel  # a rank sees its tokens' share of the gradient
            weight.pipeline_parallel = True
            weight.shared = not on_first_stage  # counted once in the gradient norm

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """The hidden states from the previous pipeline stage; called by the schedules."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, batch: Microbatch) -> Tensor:
        """F_x [s, 1, P] on the last stage, hidden states [s, 1, D] before it."""
        config = self.config
        sequence_parallel = config.sequence_parallel and config.tensor_model_parallel_size > 1

        # Into tokens, on the first stage.
        hidden_states = None
        if self.pre_process:
            x = self.x_embedder(batch.net_input.to(config.params_dtype))
            x = x + self.position_embedding(batch.positions)  # [s, D]
            hidden_states = x.to(config.params_dtype).unsqueeze(1)  # [s, 1, D]
            if sequence_parallel:
                hidden_states = tensor_parallel.scatter_to_sequence_parallel_region(hidden_states)
        context = batch.context.unsqueeze(1)  # [c, 1, E]
        if sequence_parallel:
            context = tensor_parallel.scatter_to_sequence_parallel_region(context)

        # The blocks of this stage.
        hidden_states = self.decoder(
            hidden_states,
            attention_mask=self.noise_embedding(batch.c_noise),  # see DiTLayer
            context=context,
            packed_seq_params=batch.segments,
        )
        if not self.post_process:
            return hidden_states

        # Out of tokens. The projection is replicated, so its gradient is whole on every rank already: split it, do not
        # sum it.
        if sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return self.final_linear(hidden_states)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """MegatronModule's sharded state dict, with the noise embedding written once, by the first pipeline stage."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        stage = parallel_state.get_pipeline_model_parallel_rank() + (self.vp_stage or 0) * stages
        for key, tensor in sharded.items():
            if key.startswith(f"{prefix}noise_embedding."):
                tensor.replica_id = (stage, *tensor.replica_id[1:])
        return sharded


def initialize(model: DiT, *, seed: int, std: float) -> None:
    """Draw every weight from its global name alone, whole, and keep this rank's slice: the same model in every layout.

    Matrices ~ N(0, std^2); q/k norms 1; biases 0; and zero, as in adaLN-Zero (DiT, arXiv 2212.09748), the modulation
    and the final projection, so that an untrained network is F = 0 and its loss 1 at every noise level. Weights on the
    meta device, which are there for their shapes alone, are left out.
    """

    @torch.no_grad()  # a thread has its own mode
    def draw(name: str, weight: Tensor) -> None:
        if "layernorm" in name:
            weight.fill_(1.0)
        elif name.endswith("bias") or name.startswith("final_linear") or "adaln.up" in name:
            weight.zero_()
        else:
            generator = torch.Generator().manual_seed(counter_seed(seed, "weights", name))
            whole = torch.randn(whole_shape(weight), generator=generator) * std
            weight.copy_(own_slice(weight, whole))

    # In threads, as many as this machine has cores for each of its processes.
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = min(8, (os.cpu_count() or 1) // processes)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        drawn = []
        for name, weight in model.named_parameters():
            if not weight.is_meta:
                drawn.append(pool.submit(draw, global_name(model, name), weight))
        for each in drawn:
            each.result()


def cut_axis(weight: Tensor) -> int | None:
    """The axis along which tensor parallelism cuts a parameter; None: every rank has it whole."""
    is_cut = getattr(weight, "tensor_model_parallel", False)
    return weight.partition_dim if is_cut else None


def whole_shape(weight: Tensor) -> list[int]:
    """The shape of a parameter over all tensor-parallel ranks."""
    shape = list(weight.shape)
    axis = cut_axis(weight)
    if axis is not None:
        shape[axis] *= parallel_state.get_tensor_model_parallel_world_size()
    return shape


def own_slice(weight: Tensor, whole: Tensor) -> Tensor:
    """This rank's part of a whole parameter, which has the shape that `whole_shape` says."""
    axis = cut_axis(weight)
    if axis is None:
        return whole
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return whole.chunk(size, dim=axis)[rank]


def global_name(model: DiT, name: str) -> str:
    """The name of a parameter counted over all pipeline stages: layer numbers from 0 to num_layers - 1."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = model.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
    return ".".join(parts)
