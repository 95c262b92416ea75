"""How large the network is: parameters, without building it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

BYTES_A_PARAMETER = 14
"""In a checkpoint: bf16 weight 2, fp32 main weight 4, two moments of Adam 8."""
_ADALN_RANK, _CHANNELS, _PATCH = 256, 16, 2


def parameters(values: Mapping[str, Any]) -> int:
    """Trained parameters: exact for dfmspec's network, and within a percent for DFM's."""
    return {"dfm_wan": _wan, "dfm_flux": _flux}.get(values["target"], _dit)(values)


def _wan(values: Mapping[str, Any]) -> int:
    """WAN 2.1 (NVIDIA DFM model/wan/wan_model.py and wan_layer_spec.py): 1.42 and 14.3 billion in its two sizes."""
    hidden, ffn, text = values["model.hidden_size"], values["model.ffn_hidden_size"], values["model.crossattn_emb_size"]
    attention = 4 * hidden * (hidden + 1) + 2 * hidden
    cross_attention = 2 * hidden * (hidden + 1) + 2 * hidden * (text + 1) + 2 * hidden
    block = attention + cross_attention + hidden * (2 * ffn + 1) + ffn + 8 * hidden
    patch = values["model.patch_spatial"] ** 2 * values["model.patch_temporal"]
    texts = (values["model.text_dim"] + 1) * text + (text + 1) * text
    times = (values["model.freq_dim"] + 1) * hidden + 7 * (hidden + 1) * hidden
    ends = (values["model.in_channels"] * patch + 1) * hidden + (hidden + 1) * patch * values["model.out_channels"] + 2 * hidden
    return int(values["model.num_layers"] * block + texts + times + ends)


def _flux(values: Mapping[str, Any]) -> int:
    """FLUX.1 (NVIDIA DFM model/flux/flux_model.py and layers.py): 11.9 billion as released."""
    hidden, ffn, head = values["model.hidden_size"], values["model.ffn_hidden_size"], values["model.kv_channels"]
    attention, mlp = 4 * hidden * (hidden + 1) + 2 * head, hidden * (2 * ffn + 1) + ffn
    double = 2 * (attention + mlp + 6 * hidden * (hidden + 1))
    single = attention + mlp + 3 * hidden * (hidden + 1)
    embedded = [values["model.model_channels"], values["model.vec_in_dim"], *([values["model.model_channels"]] if values["model.guidance_embed"] else [])]
    vectors = sum((width + 1) * hidden + (hidden + 1) * hidden for width in embedded)
    ends = (values["model.in_channels"] + values["model.context_dim"] + 2) * hidden + (hidden + 1) * (2 * hidden + values["model.in_channels"])
    return int(values["model.num_joint_layers"] * double + values["model.num_single_layers"] * single + vectors + ends)


def _dit(values: Mapping[str, Any]) -> int:
    hidden, layers = values["model.hidden_size"], values["model.num_layers"]
    ffn, text = values["model.ffn_hidden_size"], values["model.crossattn_emb_size"]
    width = values["model.kv_channels"] * values["model.num_attention_heads"]
    rank = values.get("model.adaln_lora_rank") or _ADALN_RANK
    patch = values.get("model.in_channels", _CHANNELS) * values.get("model.patch_spatial", _PATCH) ** 2 * values.get("model.patch_temporal", 1)
    self_attention = 3 * hidden * width + width * hidden
    cross_attention = hidden * width + 2 * text * width + width * hidden
    adaln = hidden * rank + rank * 9 * hidden
    norms = 4 * values["model.kv_channels"]
    block = self_attention + cross_attention + 2 * hidden * ffn + adaln + norms
    patches = (patch + 1) * hidden + (hidden + 1) * patch
    noise = 2 * (hidden + 1) * hidden
    return int(layers * block + patches + noise)


def pack(values: Mapping[str, Any]) -> tuple[int, float, str]:
    """Tokens of a pack, the operations of training on it, and what it was taken to hold; of WAN and FLUX, without text."""
    target, mock = values["target"], values["data.source"] == "mock"
    if target == "dfm_wan":
        sides = [values[f"dataset.{side}_latents"] // values[f"dataset.patch_{kind}"] for side, kind in (("F", "temporal"), ("H", "spatial"), ("W", "spatial"))]
        sample = math.prod(sides) if mock else values["dataset.seq_length"]
        samples = values["dataset.number_packed_samples"] if mock else 1
        return samples * sample, samples * _wan_flops(values, sample), f"samples of {sample:,} tokens" if mock else "one sample a pack, the most it can be"
    if target == "dfm_flux":
        sides = [values[f"dataset.image_{side}"] if mock else _PICTURE for side in "HW"]
        tokens = math.prod(side // (2 * values["dataset.vae_scale_factor"]) for side in sides)
        return tokens, _flux_flops(values, tokens), f"pictures of {sides[0]} x {sides[1]} pixels"
    length = values["dataset.task_encoder_seq_length"]
    if values["data.source"] == "webdataset" or "data.resolution" not in values:
        return length, flops_per_pack(values, length), "one sample a pack, the most it can be"
    tokens = min(length, (values["data.resolution"] // 8 // values["model.patch_spatial"]) ** 2)
    return length, flops_per_pack(values, tokens), f"samples of {tokens} tokens"


_PICTURE, _TEXT = 1024, 512


def _wan_flops(values: Mapping[str, Any], tokens: int) -> float:
    """A block: self-attention, attention to the text, MLP; in multiply-adds, forward, and twice as much backward."""
    hidden, ffn, text = values["model.hidden_size"], values["model.ffn_hidden_size"], values["model.crossattn_emb_size"]
    linear = tokens * (6 * hidden * hidden + 2 * hidden * ffn) + 2 * _TEXT * hidden * text
    attention = 2 * hidden * tokens * (tokens + _TEXT)
    return float(6 * values["model.num_layers"] * (linear + attention))


def _flux_flops(values: Mapping[str, Any], tokens: int) -> float:
    """A block: attention and MLP over picture and text together; the modulation is once a sample, and so left out."""
    hidden, ffn, both = values["model.hidden_size"], values["model.ffn_hidden_size"], tokens + _TEXT
    block = both * (4 * hidden * hidden + 2 * hidden * ffn) + 2 * hidden * both * both
    return float(6 * (values["model.num_joint_layers"] + values["model.num_single_layers"]) * block)


def flops_per_pack(values: Mapping[str, Any], sample_tokens: int, text_tokens: int = 512) -> float:
    """Floating-point operations of training on one pack, forward and backward, without recomputation; a multiply-add counts two.

    A pack is taken as full of samples of one size: attention costs the sum of the squares of their lengths.
    """
    length, hidden, ffn = values["dataset.task_encoder_seq_length"], values["model.hidden_size"], values["model.ffn_hidden_size"]
    width, text = values["model.kv_channels"] * values["model.num_attention_heads"], values["model.crossattn_emb_size"]
    rank = values.get("model.adaln_lora_rank") or _ADALN_RANK
    samples = length / sample_tokens
    patch = values.get("model.in_channels", _CHANNELS) * values.get("model.patch_spatial", _PATCH) ** 2 * values.get("model.patch_temporal", 1)
    linear = 2 * length * (4 * hidden * width + 2 * hidden * width + 2 * hidden * ffn) + 2 * samples * text_tokens * 2 * text * width
    attention = 4 * width * samples * (sample_tokens**2 + sample_tokens * text_tokens)
    modulation = 2 * samples * (hidden * rank + rank * 9 * hidden)
    once = 2 * length * 2 * patch * hidden + 2 * samples * 2 * hidden * hidden
    return float(3 * (values["model.num_layers"] * (linear + attention + modulation) + once))


def checkpoint_bytes(values: Mapping[str, Any]) -> int:
    """About what one checkpoint takes on disk; with dfmspec's trainer, 4 more bytes a parameter for the averaged weights."""
    extra = 4 if "diffusion.ema_decay" in values else 0
    return parameters(values) * (BYTES_A_PARAMETER + extra)
