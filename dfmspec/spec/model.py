"""`model`: the diffusion transformer and how it is cut over ranks; names of megatron-core's TransformerConfig."""

from __future__ import annotations

from typing import Literal

from dfmspec.spec.base import Count, NonNegative, Positive, Section, derived


class Model(Section):
    """The diffusion transformer: its size, its shape on the cluster, and how it saves memory."""

    tensor_model_parallel_size: Count = 1
    """TP: ranks that share each weight matrix."""
    pipeline_model_parallel_size: Count = 1
    """PP: ranks that share the layers, in order."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """VPP: model chunks on each pipeline rank; null: one chunk, no interleaving."""
    context_parallel_size: Count = 1
    """CP: ranks that share the tokens of one sequence; keys and values are gathered for each attention."""
    sequence_parallel: bool = False
    """Cut the activations between the TP regions over the TP ranks too; needs TP of at least 2."""
    num_layers: Count = 28
    """Transformer blocks."""
    hidden_size: Count = 1152
    """Width of a token."""
    num_attention_heads: Count = 16
    """Heads of self-attention and of cross-attention."""
    ffn_hidden_size: Count = derived()
    """Width inside the MLP; derived: 4 x hidden_size."""
    kv_channels: Count = derived()
    """Width of one head; derived: hidden_size / num_attention_heads."""
    num_query_groups: Count = derived()
    """Key/value heads; derived, and always num_attention_heads: cross-attention has no grouped queries."""
    crossattn_emb_size: Count = 1024
    """Width of a text-embedding token."""
    in_channels: Count = 16
    """Channels of a latent."""
    patch_spatial: Count = 2
    """Latent pixels on a side of one patch."""
    patch_temporal: Count = 1
    """Latent frames in one patch."""
    max_frames: Count = 34
    """Largest number of latent frames of a sample: size of the position table."""
    max_img_h: Count = 80
    """Largest latent height of a sample: size of the position table."""
    max_img_w: Count = 80
    """Largest latent width of a sample: size of the position table."""
    adaln_lora_rank: Count = 256
    """Rank of the adaLN-LoRA modulation in each block."""
    seq_length: Count = derived()
    """Tokens of one packed sequence; derived: dataset.task_encoder_seq_length."""
    layernorm_epsilon: Positive = 1e-6
    """Epsilon of the layer norms and of the q/k norms."""
    init_method_std: Positive = 0.02
    """Standard deviation of freshly drawn weights."""
    qk_layernorm: Literal[True] = True
    """RMSNorm over each head of q and k; DFM's network always has it."""
    transformer_impl: Literal["transformer_engine", "local"] = derived()
    """Attention back end; derived: transformer_engine on cuda, local (scaled_dot_product_attention) on cpu."""
    attention_backend: Literal["auto", "fused", "flash"] = "auto"
    (
        "On a GPU in bf16: fused: cuDNN through Transformer Engine; flash: FlashAttention 4; "
        "auto: flash on Hopper for heads of 64, 72 and\n"
        "128 channels, where the extra `flash` is installed, else fused."
    )
    cuda_graph_impl: Literal["none", "local"] = "local"
    (
        "local: on a GPU, replay forward and backward of a microbatch as one CUDA graph where its shape comes again "
        "(not with pipeline stages, recomputation\nor overlap_grad_reduce); "
        "none: launch each kernel."
    )
    deterministic_mode: bool = False
    """On a GPU, the same bits from run to run and after a resume, with slower attention."""
    recompute_granularity: Literal["full"] | None = None
    """full: recompute whole blocks in the backward pass; null: keep all activations."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How blocks are chosen for recomputation; with recompute_granularity only."""
    recompute_num_layers: Count | None = None
    """Blocks per recomputed unit (uniform), or blocks recomputed (block)."""


class Diffusion(Section):
    """EDM (Karras et al. 2022, arXiv 2206.00364): noise in training, the sampler, and the averaged weights."""

    sigma_data: Positive = 0.5
    """Standard deviation of the data that the network sees; unit-variance latents are multiplied by it."""
    p_mean: float = 0.0
    """Mean of ln(sigma) in training."""
    p_std: Positive = 1.0
    """Standard deviation of ln(sigma) in training."""
    sigma_min: Positive = 0.002
    """Smallest noise level of the sampler."""
    sigma_max: Positive = 80.0
    """Largest noise level of the sampler."""
    rho: Positive = 7.0
    """Curvature of the sampler's noise levels."""
    num_steps: Count = 35
    """Noise levels of the sampler; it evaluates the network 2 x num_steps - 1 times."""
    guidance: NonNegative = 0.0
    """Classifier-free guidance g: cond + g (cond - uncond); 0: the conditional prediction alone."""
    condition_dropout: NonNegative = 0.2
    """Share of samples whose text is replaced by zeros in training."""
    ema_decay: NonNegative = 0.9999
    """Decay of the averaged weights per iteration; ramped up as min(ema_decay, (1 + i) / (10 + i)) at iteration i."""
