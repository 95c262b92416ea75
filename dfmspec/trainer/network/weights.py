"""Consolidated weights: the whole network in one safetensors file, under our names or those of NVIDIA DFM's DiT.

DFM's names and shapes are those of its state dict at 7cb7634 (`dfm/src/megatron/model/`, there
`dit/{dit_model,dit_layer_spec}.py` and `common/dit_embeddings.py`). It is the same network but for four things: an
unused `affline_norm`; an embedding of the frame rate, which is the constant 30 there and so adds a constant vector to
the embedding of the noise level; the place of a position's width, which stands before its height there (diffusers'
table), so that two blocks of the hidden size change places; and GELU, which is exact there and by tanh here.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dfmspec.errors import CheckpointError
from dfmspec.trainer.network.bridge_weights import read_bridge_weights
from dfmspec.trainer.network.model import DiT, global_name, own_slice, whole_shape

_NAMES = (
    ("noise_embedding.", "t_embedder.1."),
    ("final_linear.", "final_layer_linear."),
    (".self_attention.", ".full_self_attention."),
    (".adaln.down.", ".adaLN.adaLN_modulation.1."),
    (".adaln.up.", ".adaLN.adaLN_modulation.2."),
)
"""Parts of a name, here and there; the rest is megatron-core's in both."""
_READS_HIDDEN = (
    "self_attention.linear_qkv.weight",
    "cross_attention.linear_q.weight",
    "mlp.linear_fc1.weight",
    "final_linear.weight",
)
"""Weights whose columns are channels of the residual stream."""
_WRITES_HIDDEN = (
    "x_embedder.weight",
    "x_embedder.bias",
    "self_attention.linear_proj.weight",
    "cross_attention.linear_proj.weight",
    "mlp.linear_fc2.weight",
)
"""Weights whose rows are."""
_MODULATES_HIDDEN = "adaln.up.weight"
"""Weights whose rows are nine times the channels."""
_MODULATIONS = 9
POSITIONS = "positions"
"""In the metadata of a file under DFM's names: in which order the positions stand; files of before have none."""
DFMS_ORDER = "time, width, height"
_FRAME_RATE = 30.0
_RATE_WIDTH = 256


def to_dfm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict in DFM's names, of a DiT of theirs that computes the same.

    Its embedding of the frame rate is zero.
    """
    found = {_dfm_name(name): _other_order(name, weight) for name, weight in weights.items()}
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


def _other_order(name: str, weight: Tensor) -> Tensor:
    """A weight of ours with height and width of the positions in the other order, whichever it has.

    A position is added to the residual stream, a quarter of its channels for time and three eighths for each of the
    others: who reads or writes the stream has its channels in the same order.
    """
    if name.endswith(_READS_HIDDEN):
        return weight.index_select(1, _swapped(weight.size(1)))
    if name.endswith(_WRITES_HIDDEN):
        return weight.index_select(0, _swapped(weight.size(0)))
    if name.endswith(_MODULATES_HIDDEN):
        by_part = weight.unflatten(0, (_MODULATIONS, -1))
        return by_part.index_select(1, _swapped(by_part.size(1))).flatten(0, 1)
    return weight


def _swapped(hidden_size: int) -> Tensor:
    """The channels with those of height and width in each other's place."""
    quarter = hidden_size // 4
    time, height, width = torch.arange(hidden_size).split([quarter, 3 * hidden_size // 8, 3 * hidden_size // 8])
    return torch.cat([time, width, height])


def from_dfm(weights: dict[str, Tensor], *, our_order: bool = False) -> dict[str, Tensor]:
    """DFM's state dict in our names, of a DiT that computes the same, but for GELU.

    DFM's constant frame rate goes into the bias of the noise embedding.

    Args:
        weights: under DFM's names.
        our_order: the positions are in our order: an earlier version of dfmspec wrote them under DFM's names.
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
            ours = _our_name(name)
            found[ours] = weight if our_order else _other_order(ours, weight)

    # The constant vector that the frame rate adds.
    if rate:
        bias = found["noise_embedding.linear_2.bias"]
        constant = F.pad(_frame_rate(rate), (0, len(bias) - _RATE_WIDTH))
        at_least_fp32 = torch.promote_types(bias.dtype, torch.float32)
        found["noise_embedding.linear_2.bias"] = (bias.double() + constant).to(at_least_fp32)
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
    """Give this rank's chunks their slices of a file of either naming, or of a checkpoint of NVIDIA DFM's DiT.

    Raises:
        CheckpointError: it cannot be read, or is of another network.
    """
    stored = _read_ours(path)
    for chunk in chunks:
        for local_name, weight in chunk.named_parameters():
            name = global_name(chunk, local_name)
            if name not in stored:
                raise CheckpointError(f"{path} has no {name}, which this model needs; it has {len(stored)} others")
            theirs = list(stored[name].shape)
            ours = whole_shape(weight)
            if theirs != ours:
                raise CheckpointError(f"the weights in {path}: {name} is {theirs} there and {ours} in this model")
            weight.copy_(own_slice(weight, stored[name]))


def _read_ours(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of either naming, or of a checkpoint of NVIDIA DFM's, under our names."""
    if path.is_dir():
        return from_dfm(read_bridge_weights(path))
    stored, facts = _read(path)
    if not any("t_embedder." in name for name in stored):
        return stored
    is_ours = "config_digest" in facts and POSITIONS not in facts
    return from_dfm(stored, our_order=is_ours)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what it says of them."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        return load_file(path), facts
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint.pretrained_checkpoint {path} cannot be read: {reason}; "
            "it must be a safetensors file, or a folder of Megatron-Bridge's checkpoints"
        ) from error
