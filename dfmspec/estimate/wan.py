"""The size of WAN 2.1: 1.42 and 14.3 billion parameters in its two sizes.

Source: NVIDIA DFM model/wan/wan_model.py and wan_layer_spec.py.
"""

from __future__ import annotations

from typing import NamedTuple

_TEXT_TOKENS = 512


class Shape(NamedTuple):
    """The numbers that the size depends on."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    crossattn_emb_size: int
    text_dim: int
    freq_dim: int
    in_channels: int
    out_channels: int
    patch: int
    """Latent pixels of one patch: height x width x frames."""


def parameters(shape: Shape) -> int:
    """Trained parameters of the network."""
    hidden = shape.hidden_size
    text = shape.crossattn_emb_size

    # A block, whose projections have a bias, and whose norms of q and k span the heads.
    square = hidden * (hidden + 1)
    of_text = hidden * (text + 1)
    norms = 2 * hidden
    attention = 4 * square + norms
    cross_attention = 2 * square + 2 * of_text + norms
    mlp = hidden * (2 * shape.ffn_hidden_size + 1) + shape.ffn_hidden_size
    # Its table of modulation has six rows, and one norm has a weight and a bias.
    block = attention + cross_attention + mlp + 8 * hidden

    # What stands before and after the blocks.
    texts = (shape.text_dim + 1) * text + (text + 1) * text
    times = (shape.freq_dim + 1) * hidden + 7 * (hidden + 1) * hidden
    patch_in = (shape.in_channels * shape.patch + 1) * hidden
    patch_out = (hidden + 1) * shape.patch * shape.out_channels
    last_modulation = 2 * hidden
    once = texts + times + patch_in + patch_out + last_modulation
    return shape.num_layers * block + once


def flops(shape: Shape, tokens: int) -> float:
    """Operations of training on a sample, forward and backward: both attentions and the MLP of each block.

    A multiply-add counts two; the backward pass is twice the forward one.
    """
    hidden = shape.hidden_size
    weights_of_tokens = 6 * hidden * hidden + 2 * hidden * shape.ffn_hidden_size
    of_tokens = tokens * weights_of_tokens
    of_text = 2 * _TEXT_TOKENS * hidden * shape.crossattn_emb_size
    # To the sample's own tokens, and to the text's.
    attention = 2 * hidden * tokens * (tokens + _TEXT_TOKENS)
    block = of_tokens + of_text + attention
    return float(6 * shape.num_layers * block)
