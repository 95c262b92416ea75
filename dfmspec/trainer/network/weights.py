"""Consolidated weights: the whole network in one safetensors file, under our names or those of NVIDIA DFM's DiT.

DFM's names and shapes are those of its state dict at 7cb7634 (`dfm/src/megatron/model/dit/{dit_model,dit_layer_spec}.py`,
`common/dit_embeddings.py`). It is the same network but for two things: an unused `affline_norm`, and an embedding of the frame
rate, which is the constant 30 there and so adds a constant vector to the embedding of the noise level.
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
    ("noise_embedding.", "t_embedder.1."), ("final_linear.", "final_layer_linear."), (".self_attention.", ".full_self_attention."),
    (".adaln.down.", ".adaLN.adaLN_modulation.1."), (".adaln.up.", ".adaLN.adaLN_modulation.2."),
)  # fmt: skip
"""Parts of a name, here and there; the rest is megatron-core's in both."""
_FRAME_RATE, _RATE_WIDTH = 30.0, 256


def to_dfm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of DFM's DiT that computes the same: its embedding of the frame rate is zero."""
    found = {}
    for name, weight in weights.items():
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)  # noqa: PLW2901
        found[name] = weight
    like = found["t_embedder.1.linear_1.weight"]
    for layer in ("linear_1", "linear_2"):
        found[f"fps_embedder.1.{layer}.weight"] = like.new_zeros(_RATE_WIDTH, _RATE_WIDTH)
        found[f"fps_embedder.1.{layer}.bias"] = like.new_zeros(_RATE_WIDTH)
    found["affline_norm.weight"] = like.new_ones(like.size(0))
    return found


def from_dfm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict that computes the same as this one of DFM's."""
    weights = {name.removeprefix("module."): weight for name, weight in weights.items() if not name.endswith("_extra_state")}
    rate = {name: weights.pop(name).double() for name in list(weights) if name.startswith("fps_embedder.")}
    weights.pop("affline_norm.weight", None)
    found = {}
    for name, weight in weights.items():
        for ours, theirs in _NAMES:
            name = name.replace(theirs, ours)  # noqa: PLW2901
        found[name] = weight
    if rate:
        bias = found["noise_embedding.linear_2.bias"]
        found["noise_embedding.linear_2.bias"] = (bias.double() + F.pad(_frame_rate(rate), (0, len(bias) - _RATE_WIDTH))).to(bias.dtype)
    return found


def _frame_rate(weights: dict[str, Tensor]) -> Tensor:
    """DFM's embedding of 30 frames a second: diffusers' Timesteps (sines, then cosines) and two linear layers."""
    half = _RATE_WIDTH // 2
    angles = _FRAME_RATE * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - 1))
    hidden = F.linear(torch.cat([angles.sin(), angles.cos()]), weights["fps_embedder.1.linear_1.weight"], weights["fps_embedder.1.linear_1.bias"])
    return F.linear(F.silu(hidden), weights["fps_embedder.1.linear_2.weight"], weights["fps_embedder.1.linear_2.bias"])


@torch.no_grad()
def load_pretrained(chunks: list[DiT], path: Path) -> None:
    """Give this rank's chunks their slices of a file of either naming.

    Raises:
        CheckpointError: the file cannot be read, or is of another network.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint.pretrained_checkpoint {path} cannot be read: {str(error).splitlines()[0]}; it must be a safetensors file") from error
    if any("t_embedder." in name for name in stored):
        stored = from_dfm(stored)
    for chunk in chunks:
        for local_name, weight in chunk.named_parameters():
            name = global_name(chunk, local_name)
            if name not in stored:
                raise CheckpointError(f"checkpoint.pretrained_checkpoint {path} has no {name}, which this model needs; it holds {len(stored)} other tensors")
            if list(stored[name].shape) != (shape := whole_shape(weight)):
                raise CheckpointError(f"checkpoint.pretrained_checkpoint {path}: {name} is {list(stored[name].shape)} there and {shape} in this model")
            weight.copy_(own_slice(weight, stored[name]))
