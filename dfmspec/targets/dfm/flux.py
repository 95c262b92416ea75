"""Target dfm_flux: NVIDIA DFM's script for FLUX at 7cb7634; its configuration is read as DiT's is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.targets import Derived, Values, dfm
from dfmspec.targets.dfm import NO_EVALUATION, config, read_back

__all__ = ["DERIVED", "ENTRY", "arguments", "config", "read_back"]
ENTRY = "examples/megatron/recipes/flux/pretrain_flux.py"
DERIVED: tuple[Derived, ...] = (*dfm.DERIVED, NO_EVALUATION)


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """With the guidance strength, which the script takes from its own flag and not from the model's configuration."""
    return [*dfm.arguments(values, origins), "--guidance-scale", str(values["model.guidance_scale"])]
