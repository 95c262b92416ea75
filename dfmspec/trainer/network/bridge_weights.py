"""The weights of NVIDIA DFM's DiT, whole, out of a checkpoint as Megatron-Bridge writes it.

megatron-core puts the layers of a homogeneous decoder into one tensor of each kind, [layers, ...], in a format of
torch's (`torch_dist`), which knows where each rank's part of it lies.

Source: megatron/bridge/training/checkpointing.py and megatron/core/transformer/transformer_block.py at the revisions
that NVIDIA DFM pins.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dfmspec.errors import CheckpointError
from dfmspec.record.bridge_checkpoints import problem
from dfmspec.spec.checkpoints import named_checkpoint

_MODEL = "module."
_LAYERS = "decoder.layers."
_NOT_WEIGHTS = "pos_embedder."
"""The table of positions, which is computed and not trained."""
_WAY_OUT = "name another, or a safetensors file, which dfmspec export makes of its own checkpoints"


def read_bridge_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, under the names of DFM's state dict, on the CPU, in the format that they have there.

    Args:
        path: a folder `iter_N`, or a folder of checkpoints, of which the newest finished one is meant.

    Raises:
        CheckpointError: there is none, or it is damaged, not trusted, or another program's.
    """
    checkpoint = named_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} is neither a safetensors file nor a folder of Megatron-Bridge's checkpoints")
    fault = problem(checkpoint)
    if fault is not None:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be used: {fault}; {_WAY_OUT}")
    reader = FileSystemReader(checkpoint)
    weights = {}
    for name, kind in reader.read_metadata().state_dict_metadata.items():
        is_weight = name.startswith(_MODEL) and not name.startswith(_MODEL + _NOT_WEIGHTS)
        if is_weight and isinstance(kind, TensorStorageMetadata):
            weights[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
    try:
        with of_one_process():
            load(weights, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = str(cause).strip().splitlines()[0]
        if isinstance(cause, UnpicklingError):  # torch's words advise to read it without its checks
            reason = "a shard is damaged, or holds what is no tensor"
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {reason}; {_WAY_OUT}") from error
    return dict(_by_layer(weights))


@contextmanager
def of_one_process() -> Iterator[None]:
    """Without torch's remark, at every call, that a checkpoint is read or written by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _by_layer(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each layer's weights by themselves, under DFM's names."""
    for whole_name, weight in weights.items():
        name = whole_name.removeprefix(_MODEL)
        kind = name.removeprefix(_LAYERS)
        if kind == name or kind[0].isdigit():
            yield name, weight
            continue
        for layer, part in enumerate(weight):
            yield f"{_LAYERS}{layer}.{kind}", part
