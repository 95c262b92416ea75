"""The tensors of a sample's files, which may come from other people: neither may run code here.

A sample is DFM's: `.pth` a latent [C, T, H, W] (or [1, C, T, H, W]), `.pickle` a text embedding [L, E] (or [1, L, E]),
`.json` its description. What a file holds is found by the reader that the checks have, without torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfmspec.data.samples import LATENT, TEXT, Part, axes_fault, infinite_fault
from dfmspec.data.tensor_files import BF16, F16, F32, F64, read_values
from dfmspec.errors import DataError

_DTYPES = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32, F64: torch.float64}


def load_latent(data: bytes) -> Tensor:
    """The latent [C, T, H, W] of a `.pth` file, on the CPU and without gradients.

    Raises:
        DataError: there is none, or the file wants to run code.
    """
    return _loaded(data, LATENT)


def load_context(data: bytes) -> Tensor:
    """The text embedding [L, E] of a `.pickle` file, on the CPU and without gradients.

    Raises:
        DataError: there is none, or the file wants to run code.
    """
    return _loaded(data, TEXT)


def _loaded(data: bytes, part: Part) -> Tensor:
    """The tensor of a file, without a leading axis of 1, and checked for what no training survives."""
    values = read_values(data, part.suffix).unbatched(part.axes)
    fault = axes_fault(values.shape, part)
    if fault:
        raise DataError(fault)
    flat = torch.frombuffer(bytearray(values.data), dtype=_DTYPES[values.format])
    tensor = flat.as_strided(values.shape, values.stride)
    if not _is_finite(tensor):
        raise DataError(infinite_fault(part))
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are, as fp32, to which latents are brought."""
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())
