"""The size of FLUX.1 (NVIDIA DFM model/flux/flux_model.py and layers.py): 11.9 billion parameters as released."""

from __future__ import annotations

from typing import NamedTuple

_TEXT_TOKENS = 512


class Shape(NamedTuple):
    """The numbers that the size depends on."""

    num_joint_layers: int
    num_single_layers: int
    hidden_size: int
    ffn_hidden_size: int
    kv_channels: int
    model_channels: int
    vec_in_dim: int
    guidance_embed: bool
    in_channels: int
    context_dim: int


def parameters(shape: Shape) -> int:
    """Trained parameters of the network."""
    hidden = shape.hidden_size

    # Blocks: of two streams, picture and text, or of one.
    square = hidden * (hidden + 1)
    attention = 4 * square + 2 * shape.kv_channels
    mlp = hidden * (2 * shape.ffn_hidden_size + 1) + shape.ffn_hidden_size
    # Modulation: shift, scale and gate, for each of two branches or of one.
    joint = 2 * (attention + mlp + 6 * square)
    single = attention + mlp + 3 * square

    # Embedded vectors: the time, the pooled text and, where the model has it, the guidance.
    embedded = [shape.model_channels, shape.vec_in_dim]
    if shape.guidance_embed:
        embedded.append(shape.model_channels)
    vectors = sum((width + 1) * hidden + square for width in embedded)

    # What stands before and after the blocks.
    tokens_in = (shape.in_channels + shape.context_dim + 2) * hidden
    tokens_out = (hidden + 1) * (2 * hidden + shape.in_channels)
    blocks = shape.num_joint_layers * joint + shape.num_single_layers * single
    return blocks + vectors + tokens_in + tokens_out


def flops(shape: Shape, tokens: int) -> float:
    """Operations of training on a picture of `tokens` tokens, forward and backward.

    Attention and MLP over picture and text together. A multiply-add counts two; the backward pass is twice the forward
    one. The modulation is once a sample, and left out.
    """
    hidden = shape.hidden_size
    both = tokens + _TEXT_TOKENS
    weights = 4 * hidden * hidden + 2 * hidden * shape.ffn_hidden_size
    attention = 2 * hidden * both * both
    block = both * weights + attention
    layers = shape.num_joint_layers + shape.num_single_layers
    return float(6 * layers * block)
