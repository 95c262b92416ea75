"""The size of the DiT: parameters, and operations of training on a pack.

Exact for dfmspec's network, within a percent for NVIDIA DFM's.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """The numbers that the size depends on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    attention_width: int
    """Channels of all heads together."""
    kv_channels: int
    crossattn_emb_size: int
    """Width of a text token."""
    adaln_lora_rank: int
    patch: int
    """Values of one patch: channels x height x width x frames."""


def parameters(shape: Shape) -> int:
    """Trained parameters of the network."""
    hidden = shape.hidden_size
    width = shape.attention_width

    # A block, whose projections have no bias.
    self_attention = 4 * hidden * width
    cross_attention = 2 * hidden * width + 2 * shape.crossattn_emb_size * width
    mlp = 2 * hidden * shape.ffn_hidden_size
    # Down to the rank, and up to shift, scale and gate of the three branches.
    adaln = (1 + 9) * hidden * shape.adaln_lora_rank
    # The norms of q and k, in both attentions.
    norms = 4 * shape.kv_channels
    block = self_attention + cross_attention + mlp + adaln + norms

    # What stands before and after the blocks.
    patches = (shape.patch + 1) * hidden + (hidden + 1) * shape.patch
    noise = 2 * (hidden + 1) * hidden
    return shape.num_layers * block + patches + noise


def flops_per_pack(shape: Shape, length: int, sample_tokens: int, text_tokens: int = 512) -> float:
    """Operations of training on one pack of `length` tokens, forward and backward, without recomputation.

    A multiply-add counts two. A pack is taken as full of samples of one size: attention costs the sum of the squares
    of their lengths.
    """
    hidden = shape.hidden_size
    width = shape.attention_width
    samples = length / sample_tokens

    # A block, forward: four projections of self-attention, two of cross-attention, the MLP.
    weights_of_tokens = 6 * hidden * width + 2 * hidden * shape.ffn_hidden_size
    of_tokens = 2 * length * weights_of_tokens
    # Keys and values of the text, once a sample.
    of_texts = 2 * samples * text_tokens * 2 * shape.crossattn_emb_size * width
    pairs = sample_tokens**2 + sample_tokens * text_tokens
    attention = 4 * width * samples * pairs
    weights_of_modulation = (1 + 9) * hidden * shape.adaln_lora_rank
    modulation = 2 * samples * weights_of_modulation
    block = of_tokens + of_texts + attention + modulation

    # Patches in and out, and the embedding of the noise level.
    patches = 2 * length * 2 * shape.patch * hidden
    noise = 2 * samples * 2 * hidden * hidden
    once = patches + noise
    forward = shape.num_layers * block + once
    # The backward pass is twice the forward one.
    return float(3 * forward)
