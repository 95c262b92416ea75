"""Safe decoding of a sample's files, which may come from other people: neither may run code here.

A sample is DFM's: `.pth` a latent [C, T, H, W] (or [1, C, T, H, W]), `.pickle` a text embedding [L, E] (or [1, L, E]),
`.json` its description.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from dfmspec.data.pickles import TENSOR_NAMES, RestrictedUnpickler, itself
from dfmspec.errors import DataError


def _itself(module: str, name: str) -> Any:
    """What an allowed name stands for: the thing itself, but for what would read without trust or want gradients."""
    if name == "_load_from_bytes":
        return _load_from_bytes
    if name == "_rebuild_parameter":
        return _rebuild_parameter
    if module.startswith("numpy.core") and hasattr(numpy, "_core"):  # numpy 2 renamed it
        module = module.replace("numpy.core", "numpy._core")
    return itself(module, name)


def _load_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _rebuild_parameter(tensor: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    return tensor


def load_latent(data: bytes) -> Tensor:
    """The latent [C, T, H, W] of a `.pth` file.

    Raises:
        DataError: there is none, or the file wants to run code.
    """
    return _unbatched(_tensor(lambda: _load_from_bytes(data), ".pth"), 4, ".pth")


def load_context(data: bytes) -> Tensor:
    """The text embedding [L, E] of a `.pickle` file.

    Raises:
        DataError: there is none, or the file wants to run code.
    """
    return _unbatched(_tensor(lambda: _unpickled(data), ".pickle"), 2, ".pickle")


def _unpickled(data: bytes) -> Tensor:
    value = RestrictedUnpickler(io.BytesIO(data), TENSOR_NAMES, _itself).load()
    if isinstance(value, numpy.ndarray):
        # torch takes the machine's own order alone, and what it may write.
        value = value.astype(value.dtype.newbyteorder("="))
    return torch.as_tensor(value)


def _tensor(load: Callable[[], Any], part: str) -> Tensor:
    try:
        value = load()
    except DataError:
        raise
    except Exception as error:  # torch.load and pickle raise whatever the bytes lead them to
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"its {part} cannot be read as a tensor: {lines[0]}") from error
    if not isinstance(value, Tensor):
        raise DataError(f"its {part} holds a {type(value).__name__}, not a tensor")
    return value


def _unbatched(tensor: Tensor, axes: int, part: str) -> Tensor:
    """Without a leading axis of 1, and checked for what no training survives."""
    if tensor.dim() == axes + 1 and tensor.size(0) == 1:
        tensor = tensor[0]
    if tensor.dim() != axes:
        raise DataError(f"its {part} has shape {list(tensor.shape)}, not {axes} axes")
    if not torch.isfinite(tensor).all():
        raise DataError(f"its {part} has values that are not finite")
    return tensor
