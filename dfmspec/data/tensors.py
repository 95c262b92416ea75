"""Tensors in a sample's files, read without torch and without running anything: shapes, formats and plain statistics.

A pickle is unpickled with stand-ins for the few names that a tensor needs; any other name is an error, before it is
imported. Formats: torch.save's zip file (.pth), and a pickle of a tensor or of a numpy array (.pickle).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from array import array
from dataclasses import dataclass
from typing import Any

from dfmspec.errors import DataError

LARGEST = 256 * 2**20
"""Bytes of a file that are read; a sample's are some thousand."""
_MAGIC = 0x1950A86A20F9469CFC6C
"""With this number torch.save's older form begins."""
_FORMATS = {"BFloat16": ("bf16", 2), "Half": ("f16", 2), "Float": ("f32", 4), "Double": ("f64", 8)}
_NUMPY = {"f2": ("f16", 2), "f4": ("f32", 4), "f8": ("f64", 8)}


@dataclass(frozen=True, slots=True)
class Tensor:
    """What can be said of a tensor: its shape, its number format, and its values taken together."""

    shape: tuple[int, ...]
    format: str
    finite: bool
    largest: float
    """The largest absolute value."""
    mean: float
    mean_square: float


@dataclass
class _Storage:
    format: str
    size: int
    data: bytes = b""


@dataclass
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    extent: int
    """Elements of the storage from the first to the last that it shows."""


class _Array:
    """A numpy array as its pickle builds it."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype:
    def __init__(self, text: str, *args: Any) -> None:
        self.text, self.order = text.lstrip("<>=|"), text[0] if text[0] in "<>" else "<"

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.order = state[1]


def _from_buffer(buffer: Any, dtype: _Dtype, shape: tuple[int, ...], *rest: Any) -> _Array:
    found = _Array()
    found.state = (1, shape, dtype, False, bytes(buffer))
    return found


def _rebuild(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise DataError("its pickle builds a tensor on something that is no storage")
    extent = 1 + sum((int(n) - 1) * int(step) for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
    return _View(storage, int(offset), tuple(int(n) for n in size), extent)


class _Unpickler(pickle.Unpickler):
    """Knows the names of tensors and arrays, as stand-ins; refuses all others."""

    storages: dict[str, _Storage]

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        super().__init__(self.stream)
        self.storages = {}

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): dict, ("torch._utils", "_rebuild_tensor_v2"): _rebuild, ("torch.storage", "_load_from_bytes"): _legacy,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor, ("numpy.core.numeric", "_frombuffer"): _from_buffer,
            ("numpy._core.numeric", "_frombuffer"): _from_buffer,
            ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
            ("numpy.core.multiarray", "_reconstruct"): _Array, ("numpy._core.multiarray", "_reconstruct"): _Array,
        }  # fmt: skip
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name.removesuffix("Storage") in _FORMATS:
            return name.removesuffix("Storage")
        if module.partition(".")[0] in ("torch", "numpy"):
            raise DataError(f"its pickle holds {module}.{name}, and no tensor of floating-point numbers")
        raise DataError(f"its pickle wants to run {module}.{name}, which a tensor does not need")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid[:5]
        if kind != "storage" or dtype not in _FORMATS:
            raise DataError(f"its pickle names {str(pid)[:60]}, which is no storage of floating-point numbers")
        return self.storages.setdefault(str(key), _Storage(_FORMATS[dtype][0], int(size)))


def _legacy(data: bytes) -> Any:
    """torch.save's older form, which a pickled tensor carries too: four pickles, then each storage's bytes."""
    reader = _Unpickler(data)
    for _ in range(3):  # magic number, protocol, system
        _Unpickler.load(reader)
    found = reader.load()
    keys = reader.load()
    for key in keys:
        storage = reader.storages[str(key)]
        (size,) = struct.unpack("<q", reader.stream.read(8))
        width = next(width for name, width in _FORMATS.values() if name == storage.format)
        storage.data = reader.stream.read(size * width)
    return found


def read_tensor(data: bytes, part: str) -> Tensor:
    """The tensor of a `.pth` or `.pickle` file.

    Raises:
        DataError: there is none, or the file wants to run code.
    """
    try:
        value = _from_zip(data) if data[:2] == b"PK" else _Unpickler(data).load()
        return _described(_legacy(data) if value == _MAGIC else value, part)
    except DataError as error:
        raise DataError(str(error).replace("its pickle", f"its {part}")) from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise DataError(f"its {part} cannot be read as a tensor: {str(error)[:80] or type(error).__name__}") from error


def _from_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
            raise DataError(f"its pickle unpacks to more than {LARGEST >> 20} MiB")
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        reader = _Unpickler(archive.read(name))
        value = reader.load()
        for key, storage in reader.storages.items():
            storage.data = archive.read(f"{name[: -len('data.pkl')]}data/{key}")
    return value


def _described(value: Any, part: str) -> Tensor:
    if isinstance(value, _View):
        width = next(width for name, width in _FORMATS.values() if name == value.storage.format)
        data = value.storage.data[value.offset * width : (value.offset + value.extent) * width]
        if len(data) < value.extent * width:
            raise DataError(f"its {part} breaks off")
        return _statistics(value.shape, value.storage.format, data)
    if isinstance(value, _Array) and isinstance(value.state, tuple) and len(value.state) >= 5:
        _, shape, dtype, _, raw = value.state[:5]
        name, width = _NUMPY.get(dtype.text, ("", 0))
        if name and isinstance(raw, bytes) and len(raw) == math.prod(shape) * width:
            if dtype.order == ">":
                swapped = array({2: "H", 4: "I", 8: "Q"}[width], raw)
                swapped.byteswap()
                raw = swapped.tobytes()
            return _statistics(tuple(shape), name, raw)
    raise DataError(f"its {part} holds no tensor of floating-point numbers")


def _statistics(shape: tuple[int, ...], format_: str, data: bytes) -> Tensor:
    values = _floats(format_, data)
    finite = all(map(math.isfinite, values))
    count = max(1, len(values))
    if not finite:
        return Tensor(shape, format_, False, math.inf, 0.0, 0.0)
    return Tensor(shape, format_, True, max((abs(v) for v in values), default=0.0), math.fsum(values) / count, math.fsum(v * v for v in values) / count)


def _floats(format_: str, data: bytes) -> Any:
    if format_ == "bf16":  # the upper half of a float
        halves = array("H", data)
        return array("f", array("I", [half << 16 for half in halves]).tobytes())
    if format_ == "f16":
        return struct.unpack(f"<{len(data) // 2}e", data)
    return array("f" if format_ == "f32" else "d", data)
