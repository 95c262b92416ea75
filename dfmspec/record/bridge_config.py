"""What a checkpoint of NVIDIA DFM's DiT was trained with, as our configuration says it.

Source: the file that Megatron-Bridge writes into each checkpoint, with every field of every object.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dfmspec.bounded import METADATA_BYTES, load_yaml, read_text
from dfmspec.errors import CheckpointError
from dfmspec.spec.checkpoints import RUN_CONFIG, without_tags
from dfmspec.spec.network import NETWORK

SHARED_FIELDS = (*(name for name in NETWORK if name != "adaln_lora_rank"), "layernorm_epsilon")
"""Keys of `model` that are fields of DFM's provider of the DiT, name and value."""
_DITS = "dfm.src.megatron.model.dit."
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def trained_config(checkpoint: Path) -> dict[str, Any]:
    """The sections `model`, `diffusion`, `mixed_precision` and `cluster` of what DFM's DiT was trained with.

    Args:
        checkpoint: a folder `iter_N` of Megatron-Bridge's.

    Raises:
        CheckpointError: it does not say, or is of another network.
    """
    file = checkpoint / RUN_CONFIG
    try:
        told = load_yaml(without_tags(read_text(file, most=METADATA_BYTES)), _LOADER)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} is damaged: {reason}") from error
    model = told.get("model") if isinstance(told, dict) else None
    provider = model.get("_target_") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not str(provider).startswith(_DITS):
        raise CheckpointError(f"{checkpoint} is of {provider}, says its {RUN_CONFIG}, and not of NVIDIA DFM's DiT")
    missing = [name for name in (*SHARED_FIELDS, "sigma_data") if name not in model]
    if missing:
        raise CheckpointError(f"{file} does not say model.{missing[0]}")
    return {
        "model": {name: model[name] for name in SHARED_FIELDS},
        "diffusion": {"sigma_data": model["sigma_data"]},
        "mixed_precision": {"bf16": True},
        "cluster": {"device": "cuda"},
    }
