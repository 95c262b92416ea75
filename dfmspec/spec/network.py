"""What makes a network another one, told without the models of `spec/model.py`."""

from __future__ import annotations

NETWORK = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "num_query_groups",
    "crossattn_emb_size",
    "in_channels",
    "patch_spatial",
    "patch_temporal",
    "max_frames",
    "max_img_h",
    "max_img_w",
    "adaln_lora_rank",
)
"""The keys of `model` that shape its parameters."""
