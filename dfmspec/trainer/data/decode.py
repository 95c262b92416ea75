"""Safe decoding of a sample's files, which may come from other people: neither may run code here.

A sample is DFM's: `.pth` a latent [C, T, H, W] (or [1, C, T, H, W]), `.pickle` a text embedding [L, E] (or [1, L, E]),
`.json` its description.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, ClassVar

import torch
from torch import Tensor

from dfmspec.errors import DataError


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and numpy arrays, and refuses to import anything else."""

    _ALLOWED: ClassVar = {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        raise DataError(f"its pickle wants to run {module}.{name}, which a tensor does not need")


def load_latent(data: bytes) -> Tensor:
    """The latent [C, T, H, W] of a `.pth` file; raises DataError."""
    return _unbatched(_tensor(lambda: torch.load(io.BytesIO(data), weights_only=True), ".pth"), 4, ".pth")


def load_context(data: bytes) -> Tensor:
    """The text embedding [L, E] of a `.pickle` file; raises DataError."""
    return _unbatched(_tensor(lambda: torch.as_tensor(_TensorUnpickler(io.BytesIO(data)).load()), ".pickle"), 2, ".pickle")


def _tensor(load: Any, part: str) -> Tensor:
    try:
        value = load()
    except DataError:
        raise
    except Exception as error:  # torch.load and pickle raise whatever the bytes lead them to
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"its {part} cannot be read as a tensor: {first_line}") from error
    if not isinstance(value, Tensor):
        raise DataError(f"its {part} holds a {type(value).__name__}, not a tensor")
    return value


def _unbatched(tensor: Tensor, axes: int, part: str) -> Tensor:
    if tensor.dim() == axes + 1 and tensor.size(0) == 1:
        tensor = tensor[0]
    if tensor.dim() != axes:
        raise DataError(f"its {part} has shape {list(tensor.shape)}, not {axes} axes")
    if not torch.isfinite(tensor).all():
        raise DataError(f"its {part} has values that are not finite")
    return tensor
