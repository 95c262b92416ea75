"""Samples of every kind that a data set may have: number format, layout, form of the file, and fault."""

from __future__ import annotations

import io
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.serialization import set_crc32_options

LATENT = (4, 1, 2, 6)
TEXT = (3, 8)
DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
)
FLOATS = DTYPES[:4]


class Window:
    """A tensor as a pickle may build it, whatever torch itself would: a window on a storage of 48 numbers."""

    def __init__(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.arguments = (torch.randn(48).storage(), offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def _gap_of_nan(tensor: Tensor) -> Tensor:
    """Every second number of a storage whose others are NaN."""
    wide = torch.full((*tensor.shape, 2), torch.nan, dtype=torch.float32).to(tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "contiguous": lambda tensor: tensor,
    "batched": lambda tensor: tensor[None],
    "permuted": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "end of a storage": lambda tensor: torch.cat([tensor, tensor])[len(tensor) :],
    "gaps": _gap_of_nan,
    "with gradients": lambda tensor: tensor.clone().requires_grad_(),
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
    "sparse": lambda tensor: tensor.to_sparse(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.float()[0], tensor.float()[1]]),
    "meta": lambda tensor: tensor.to("meta"),
}


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    def fill(tensor: Tensor) -> Tensor:
        filled = tensor.clone()
        filled.view(-1)[-1] = value
        return filled

    return fill


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda tensor: tensor,
    "NaN": _filled(float("nan")),
    "inf": _filled(float("-inf")),
    "infinite as fp32": _filled(1e300),
    "largest of fp32": _filled(3.4028234e38),
    "no numbers": lambda tensor: tensor[:0],
    "an axis more": lambda tensor: torch.stack([tensor, tensor]),
    "an axis less": lambda tensor: tensor[0],
    "in a dict": lambda tensor: {"tensor": tensor},
    "list": lambda tensor: tensor.float().tolist(),
    "offset beyond": lambda tensor: Window(1_000_000, tuple(tensor.shape), tuple(tensor.stride())),
    "shape beyond": lambda tensor: Window(0, (*tensor.shape[:-1], 1000), tuple(tensor.stride())),
    "strides of another shape": lambda tensor: Window(0, tuple(tensor.shape), (1,)),
    "2^40 numbers": lambda tensor: torch.zeros(1, dtype=tensor.dtype).expand(2**20, *[1] * (tensor.dim() - 2), 2**20),
}


def _saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@contextmanager
def _saved_on(device: str):
    """What is saved says that it lay on a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: device)
        yield


def _on_gpu(value: Any, **options: Any) -> bytes:
    with _saved_on("cuda:3"):
        return _saved(value, **options)


def _pickled_on_gpu(value: Any) -> bytes:
    with _saved_on("cuda:3"):
        return pickle.dumps(value)


def _without_checksums(value: Any) -> bytes:
    set_crc32_options(False)
    try:
        return _saved(value)
    finally:
        set_crc32_options(True)


def _as_array(value: Any, order: str, protocol: int) -> bytes:
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized and not value.is_nested:
        value = value.detach()
        if value.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            value = value.float()
        if value.device.type == "cpu" and value.numel() < 2**20:
            value = np.array(value.numpy(), order=order)  # type: ignore[call-overload]
    return pickle.dumps(value, protocol=protocol)


CONTAINERS: dict[str, Callable[[Any], bytes]] = {
    "zip": _saved,
    "older form": lambda value: _saved(value, _use_new_zipfile_serialization=False),
    "zip from a GPU": _on_gpu,
    "older form from a GPU": lambda value: _on_gpu(value, _use_new_zipfile_serialization=False),
    "pickle from a GPU": _pickled_on_gpu,
    "zip without checksums": _without_checksums,
    **{f"pickle {protocol}": lambda value, p=protocol: pickle.dumps(value, protocol=p) for protocol in (2, 3, 4, 5)},
    **{
        f"numpy {order} {protocol}": lambda value, o=order, p=protocol: _as_array(value, o, p)
        for order in "CF"
        for protocol in (2, 4, 5)
    },
}

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda data: data,
    "cut": lambda data: data[: len(data) // 2],
    "cut at its end": lambda data: data[:-40],
    "empty": lambda data: b"",
    "bits": lambda data: bytes([*data[:40], data[40] ^ 255, *data[41:]]),
}


class Made(NamedTuple):
    """A file of a sample."""

    kind: str
    data: bytes
    tensor: Tensor | None
    """What must come out of it; None: it is faulty, or may be."""


def made(chance: random.Random, shape: tuple[int, ...]) -> Made | None:
    """A random file; None where torch itself makes none of that kind."""
    dtype = chance.choice(DTYPES if chance.random() < 0.3 else FLOATS)
    layout = chance.choice(list(LAYOUTS))
    fault = chance.choice(list(FAULTS)) if chance.random() < 0.4 else "none"
    container = chance.choice(list(CONTAINERS))
    damage = chance.choice(list(DAMAGES)) if chance.random() < 0.15 else "none"
    kind = f"{dtype}, {layout}, {fault}, {container}, {damage}"
    plain = torch.randn(shape).to(dtype)
    try:
        value = FAULTS[fault](plain)
        if isinstance(value, Tensor) and fault != "2^40 numbers":
            value = LAYOUTS[layout](value)
        data = DAMAGES[damage](CONTAINERS[container](value))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
        return None
    is_right = fault == "none" and damage == "none" and dtype in FLOATS
    is_right = is_right and layout not in ("sparse", "quantized", "nested", "meta")
    if not is_right:
        return Made(kind, data, None)
    return Made(kind, data, value.detach().reshape(shape))
