"""Target dfm_wan: NVIDIA DFM's script for WAN at 7cb7634; its configuration is read as DiT's is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.targets import Derived, Values, dfm
from dfmspec.targets.dfm import NO_EVALUATION, config, read_back

__all__ = ["DERIVED", "ENTRY", "arguments", "config", "read_back"]
ENTRY = "examples/megatron/recipes/wan/pretrain_wan.py"
DERIVED: tuple[Derived, ...] = (
    *(derivation for derivation in dfm.DERIVED if derivation.key != "model.qk_layernorm"),
    NO_EVALUATION,
    Derived("model.qk_layernorm", (), lambda v: False, "WAN's norms span the heads: each rank has their whole gradient"),
    Derived("dataset.packing_buffer_size", ("data.source",), lambda v: None if v["data.source"] == "mock" else 150,
            "150; none for random data, which come packed"),
)  # fmt: skip


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """With the training mode, which the script for pretraining takes for that of finetuning by itself."""
    return ["--training-mode", "pretrain", *dfm.arguments(values, origins)]
