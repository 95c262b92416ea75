"""Tensors in a sample's files, read without torch and without running anything: shapes, formats and plain statistics.

A pickle is unpickled with stand-ins for the few names that a tensor needs (`data/pickles.py`). Formats: torch.save's
zip file (.pth), torch.save's older form, and a pickle of a tensor or of a numpy array (.pickle).
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dfmspec.data.pickles import STORAGE_NAMES, TENSOR_NAMES, RestrictedUnpickler
from dfmspec.errors import DataError

LARGEST = 256 * 2**20
"""Bytes of a file that are read; a sample's are some thousand."""
_MAGIC = 0x1950A86A20F9469CFC6C
"""With this number torch.save's older form begins."""


class _Format(NamedTuple):
    """A number format."""

    name: str
    width: int
    """Bytes of one number."""
    swapped_as: str
    """The array type of integers that are as wide, for swapping bytes."""


_BF16 = _Format("bf16", 2, "H")
_F16 = _Format("f16", 2, "H")
_F32 = _Format("f32", 4, "I")
_F64 = _Format("f64", 8, "Q")
_OF_STORAGE = {"BFloat16Storage": _BF16, "HalfStorage": _F16, "FloatStorage": _F32, "DoubleStorage": _F64}
_OF_NUMPY = {"f2": _F16, "f4": _F32, "f8": _F64}


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


# What the names of a pickle stand for here.


@dataclass
class _Storage:
    """A storage of torch: its bytes come after the pickle, or from another member of the zip file."""

    format: _Format
    size: int
    data: bytes = b""


class _View(NamedTuple):
    """A tensor of torch: a window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    extent: int
    """Elements of the storage from the first to the last that it shows."""


class _Array:
    """A numpy array, as protocols 2 to 4 rebuild it."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype:
    """A number format of numpy."""

    def __init__(self, text: str, *args: Any) -> None:
        self.text = text.lstrip("<>=|")
        self.order = text[0] if text[0] in "<>" else "<"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2:
            return
        if state[1] in ("<", ">"):
            self.order = state[1]


def _from_buffer(buffer: Any, dtype: _Dtype, shape: tuple[int, ...], *rest: Any) -> _Array:
    """A numpy array, as protocol 5 takes its buffer."""
    found = _Array()
    found.state = (1, shape, dtype, False, bytes(buffer))
    return found


def _rebuilt(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any) -> _View:
    """A tensor of torch, as `torch._utils._rebuild_tensor_v2` makes it."""
    if not isinstance(storage, _Storage):
        raise DataError("its pickle builds a tensor on something that is no storage")
    extent = 0
    if math.prod(size):
        extent = 1
        for n, step in zip(size, stride, strict=True):
            extent += (int(n) - 1) * int(step)
    shape = tuple(int(n) for n in size)
    return _View(storage, int(offset), shape, extent)


def _parameter(tensor: Any, *rest: Any) -> Any:
    """A parameter of torch: the tensor in it."""
    return tensor


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes, which protocol 2 writes as a text."""
    return text.encode("latin1")


def _stand_in(module: str, name: str) -> Any:
    """What an allowed name stands for; a storage's name stands for itself."""
    if name in STORAGE_NAMES:
        return name
    known: dict[str, Any] = {
        "OrderedDict": dict,
        "_rebuild_parameter": _parameter,
        "_rebuild_tensor_v2": _rebuilt,
        "_load_from_bytes": _legacy,
        "encode": _encoded,
        "dtype": _Dtype,
        "ndarray": _Array,
        "_reconstruct": _Array,
        "_frombuffer": _from_buffer,
    }
    return known[name]


class _Unpickler(RestrictedUnpickler):
    """Remembers the storages that a pickle names."""

    def __init__(self, data: bytes) -> None:
        self.stream = io.BytesIO(data)
        self.storages: dict[str, _Storage] = {}
        super().__init__(self.stream, TENSOR_NAMES, _stand_in)

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of an id: ("storage", type, key, location, size)."""
        kind, storage_type, key, _, size = pid[:5]
        if kind != "storage" or storage_type not in _OF_STORAGE:
            shown = str(pid)[:60]
            raise DataError(f"its pickle names {shown}, which is no storage of floating-point numbers")
        storage = _Storage(_OF_STORAGE[storage_type], int(size))
        return self.storages.setdefault(str(key), storage)


def _legacy(data: bytes) -> Any:
    """torch.save's older form, which a pickled tensor carries too: four pickles, then each storage's bytes."""
    reader = _Unpickler(data)
    for _ in range(3):  # magic number, protocol, system
        pickle.Unpickler.load(reader)
    found = reader.load()
    for key in reader.load():
        storage = reader.storages[str(key)]
        (size,) = struct.unpack("<q", reader.stream.read(8))
        storage.data = reader.stream.read(size * storage.format.width)
    return found


def read_tensor(data: bytes, part: str) -> Tensor:
    """The tensor of a file, `part` being its suffix: ".pth" or ".pickle".

    Raises:
        DataError: there is none, or the file wants to run code.
    """
    try:
        is_zip = data[:2] == b"PK"
        value = _from_zip(data) if is_zip else _Unpickler(data).load()
        if value == _MAGIC:
            value = _legacy(data)
        return _described(value, part)
    except DataError as error:
        raise DataError(str(error).replace("its pickle", f"its {part}")) from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        said = str(error)[:80] or type(error).__name__
        raise DataError(f"its {part} cannot be read as a tensor: {said}") from error


def _from_zip(data: bytes) -> Any:
    """What torch.save's zip file holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # A zip file may unpack to far more than it has.
        if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
            mebibytes = LARGEST >> 20
            raise DataError(f"its pickle unpacks to more than {mebibytes} MiB")
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        reader = _Unpickler(archive.read(name))
        value = reader.load()
        for key, storage in reader.storages.items():
            storage.data = archive.read(f"{folder}data/{key}")
    return value


def _described(value: Any, part: str) -> Tensor:
    """What can be said of what a file holds.

    Raises:
        DataError: it is no tensor, or breaks off.
    """
    if isinstance(value, _View):
        width = value.storage.format.width
        start = value.offset * width
        size = value.extent * width
        data = value.storage.data[start : start + size]
        if len(data) < size:
            raise DataError(f"its {part} breaks off")
        return _statistics(value.shape, value.storage.format, data)
    if isinstance(value, _Array):
        found = _described_array(value.state)
        if found is not None:
            return found
    raise DataError(f"its {part} holds no tensor of floating-point numbers")


def _described_array(state: Any) -> Tensor | None:
    """What can be said of a numpy array by its state: (version, shape, dtype, Fortran's order, bytes)."""
    if not isinstance(state, tuple) or len(state) < 5:
        return None
    _, shape, dtype, _, raw = state[:5]
    format_ = _OF_NUMPY.get(dtype.text)
    if format_ is None or not isinstance(raw, bytes):
        return None
    if len(raw) != math.prod(shape) * format_.width:
        return None

    # Big-endian numbers are turned round.
    if dtype.order == ">":
        swapped = array(format_.swapped_as, raw)
        swapped.byteswap()
        raw = swapped.tobytes()
    return _statistics(tuple(shape), format_, raw)


def _statistics(shape: tuple[int, ...], format_: _Format, data: bytes) -> Tensor:
    """What can be said of a tensor by its little-endian bytes."""
    values = _floats(format_, data)
    if not all(map(math.isfinite, values)):
        return Tensor(shape, format_.name, finite=False, largest=math.inf, mean=0.0, mean_square=0.0)
    count = max(1, len(values))
    return Tensor(
        shape,
        format_.name,
        finite=True,
        largest=max((abs(value) for value in values), default=0.0),
        mean=math.fsum(values) / count,
        mean_square=math.fsum(value * value for value in values) / count,
    )


def _floats(format_: _Format, data: bytes) -> Sequence[float]:
    """The numbers in some bytes."""
    if format_ is _BF16:  # the upper half of a float
        halves = array("H", data)
        words = array("I", [half << 16 for half in halves])
        return array("f", words.tobytes())
    if format_ is _F16:
        count = len(data) // 2
        return struct.unpack(f"<{count}e", data)
    if format_ is _F32:
        return array("f", data)
    return array("d", data)
