"""Consolidated weights: the whole network in one safetensors file, under our names or those of NVIDIA DFM's DiT.

DFM's names and shapes are those of its state dict at 7cb7634 (`dfm/src/megatron/model/`, there
`dit/{dit_model,dit_layer_spec}.py` and `common/dit_embeddings.py`). It is the same network but for two things: an
unused `affline_norm`, and an embedding of the frame rate, which is the constant 30 there and so adds a constant vector
to the embedding of the noise level.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dfmspec.errors import CheckpointError
from dfmspec.trainer.network.model import DiT, global_name, own_slice, whole_shape

_NAMES = (
    ("noise_embedding.", "t_embedder.1."),
    ("final_linear.", "final_layer_linear."),
    (".self_attention.", ".full_self_attention."),
    (".adaln.down.", ".adaLN.adaLN_modulation.1."),
    (".adaln.up.", ".adaLN.adaLN_modulation.2."),
)
"""Parts of a name, here and there; the rest is megatron-core's in both."""
_FRAME_RATE = 30.0
_RATE_WIDTH = 256


def to_dfm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in DFM's names, of a DiT of theirs that computes the same.

    Its embedding of the frame rate is zero.
    """
    found = {_dfm_name(name): weight for name, weight in weights.items()}
    like = found["t_embedder.1.linear_1.weight"]
    for layer in ("linear_1", "linear_2"):
        found[f"fps_embedder.1.{layer}.weight"] = like.new_zeros(_RATE_WIDTH, _RATE_WIDTH)
        found[f"fps_embedder.1.{layer}.bias"] = like.new_zeros(_RATE_WIDTH)
    found["affline_norm.weight"] = like.new_ones(like.size(0))
    return found


def _dfm_name(name: str) -> str:
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return name


def from_dfm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DFM's state dict in our names, of a DiT that computes the same.

    DFM's constant frame rate goes into the bias of the noise embedding.
    """
    # Our names.
    found = {}
    rate = {}
    for their_name, weight in weights.items():
        name = their_name.removeprefix("module.")
        if name.endswith("_extra_state") or name == "affline_norm.weight":
            continue
        if name.startswith("fps_embedder."):
            rate[name] = weight.double()
        else:
            found[_our_name(name)] = weight

    # The constant vector that the frame rate adds.
    if rate:
        bias = found["noise_embedding.linear_2.bias"]
        constant = F.pad(_frame_rate(rate), (0, len(bias) - _RATE_WIDTH))
        found["noise_embedding.linear_2.bias"] = (bias.double() + constant).to(bias.dtype)
    return found


def _our_name(name: str) -> str:
    for ours, theirs in _NAMES:
        name = name.replace(theirs, ours)
    return name


def _frame_rate(weights: dict[str, Tensor]) -> Tensor:
    """DFM's embedding of 30 frames a second: diffusers' Timesteps (sines, then cosines) and two linear layers."""
    half = _RATE_WIDTH // 2
    steps = torch.arange(half, dtype=torch.float64)
    frequencies = torch.exp(-math.log(10000) * steps / (half - 1))
    angles = _FRAME_RATE * frequencies
    x = torch.cat([angles.sin(), angles.cos()])
    x = F.linear(x, weights["fps_embedder.1.linear_1.weight"], weights["fps_embedder.1.linear_1.bias"])
    return F.linear(F.silu(x), weights["fps_embedder.1.linear_2.weight"], weights["fps_embedder.1.linear_2.bias"])


@torch.no_grad()
def load_pretrained(chunks: list[DiT], path: Path) -> None:
    """Give this rank's chunks their slices of a file of either naming.

    Raises:
        CheckpointError: the file cannot be read, or is of another network.
    """
    stored = _read(path)
    if any("t_embedder." in name for name in stored):
        stored = from_dfm(stored)
    for chunk in chunks:
        for local_name, weight in chunk.named_parameters():
            name = global_name(chunk, local_name)
            if name not in stored:
                raise CheckpointError(
                    f"checkpoint.pretrained_checkpoint {path} has no {name}, which this model needs; "
                    f"it holds {len(stored)} other tensors"
                )
            theirs = list(stored[name].shape)
            ours = whole_shape(weight)
            if theirs != ours:
                raise CheckpointError(
                    f"checkpoint.pretrained_checkpoint {path}: {name} is {theirs} there and {ours} in this model"
                )
            weight.copy_(own_slice(weight, stored[name]))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint.pretrained_checkpoint {path} cannot be read: {reason}; it must be a safetensors file"
        ) from error
