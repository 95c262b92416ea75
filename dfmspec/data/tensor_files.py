"""The tensor in a sample's file, found without torch and without running anything: its shape and its bytes.

A pickle is unpickled with stand-ins for the few names that a tensor needs (`data/pickles.py`). Formats: torch.save's
zip file, torch.save's older form, and a pickle of a tensor or of a numpy array. The checks and the trainer read samples
here alone, so that what the one refuses the other does, in the same words. On which device a tensor was saved, and
whether it wanted gradients, is not looked at: a sample is numbers.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from dfmspec.data.pickles import LARGEST, STORAGE_NAMES, TENSOR_NAMES, RestrictedUnpickler
from dfmspec.errors import DataError

_MAGIC = 0x1950A86A20F9469CFC6C
"""With this number torch.save's older form begins."""


class Format(NamedTuple):
    """A number format."""

    name: str
    width: int
    """Bytes of one number."""
    swapped_as: str
    """The array type of integers that are as wide, for swapping bytes."""


BF16 = Format("bf16", 2, "H")
F16 = Format("f16", 2, "H")
F32 = Format("f32", 4, "I")
F64 = Format("f64", 8, "Q")
_UNTYPED = Format("bytes", 1, "B")
"""A storage whose tensor says what its bytes are; torch's newer formats have such."""
_OF_STORAGE = {
    "BFloat16Storage": BF16,
    "HalfStorage": F16,
    "FloatStorage": F32,
    "DoubleStorage": F64,
    "UntypedStorage": _UNTYPED,
}
_OF_NUMPY = {"f2": F16, "f4": F32, "f8": F64}


class Values(NamedTuple):
    """A tensor in a file: a window on its bytes."""

    format: Format
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """Elements from one index of each axis to the next, as torch has them."""
    data: bytes
    """Little-endian, from the first element that is shown to the last."""

    def unbatched(self, axes: int) -> Values:
        """Without a leading axis of 1, where there is one more than `axes`."""
        if len(self.shape) == axes + 1 and self.shape[0] == 1:
            return self._replace(shape=self.shape[1:], stride=self.stride[1:])
        return self


# What is refused, in words.

_STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
"""torch's storages of other numbers, and the format of each."""
_KINDS = {"b": "bool", "c": "complex", "f": "float", "i": "int", "u": "uint"}
"""numpy's letters for kinds of numbers."""
_LAYOUTS = {
    "_rebuild_sparse_tensor": ("a sparse tensor", "with .to_dense()"),
    "_rebuild_qtensor": ("a quantized tensor", "with .dequantize()"),
    "_rebuild_nested_tensor": ("a nested tensor", "as one tensor for each sample"),
    "_rebuild_njt": ("a nested tensor", "as one tensor for each sample"),
    "_rebuild_meta_tensor_no_storage": ("a tensor of the meta device, without values", "from a device that has them"),
    "_rebuild_device_tensor_from_numpy": ("a tensor of another device's own form", "with .cpu()"),
}
"""What rebuilds a tensor that is no window on one storage: what it is, and how to save it."""
_DTYPE = re.compile(r"q?u?int\d|b?float\d|complex\d|bits\d|bool$")
"""torch's names of number formats."""


def _other_numbers(name: str) -> DataError:
    return DataError(
        f"its pickle holds {name} values, not floating-point numbers of 16, 32 or 64 bits; "
        "save it with .to(torch.bfloat16)"
    )


def _other_thing(value: Any) -> DataError:
    name = type(value).__name__.lstrip("_")
    return DataError(f"its pickle holds a {name}, not a tensor of floating-point numbers; save the tensor alone")


def refuse_larger(size: int, part: str) -> None:
    """Refuse a file of more bytes than are read.

    Raises:
        DataError: it has more.
    """
    if size > LARGEST:
        raise DataError(f"its {part} has {size} bytes; {LARGEST} are the most that are read")


# What the names of a pickle stand for here.


@dataclass
class _Storage:
    """A storage of torch: its bytes come after the pickle, or from another member of the zip file."""

    format: Format
    data: bytes = b""


class _View(NamedTuple):
    """A tensor of torch: a window on a storage, whose bytes may not be read yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


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


def _from_buffer(buffer: Any, dtype: _Dtype, shape: tuple[int, ...], order: str = "C", *rest: Any) -> _Array:
    """A numpy array, as protocol 5 takes its buffer."""
    if order not in ("C", "F"):
        raise DataError("its pickle holds an array with its axes swapped; save it with numpy.ascontiguousarray")
    found = _Array()
    found.state = (1, shape, dtype, order == "F", bytes(buffer))
    return found


def _rebuilt(
    storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], gradient: Any, hooks: Any, meta: Any = None
) -> _View:
    """A tensor of torch, as `torch._utils._rebuild_tensor_v2` makes it."""
    if not isinstance(storage, _Storage):
        raise DataError("its pickle builds a tensor on something that is no storage")
    shape = tuple(size)
    steps = tuple(stride)
    numbers = (offset, *shape, *steps)
    if len(shape) != len(steps) or not all(type(number) is int and number >= 0 for number in numbers):
        raise DataError("its pickle builds a tensor of a shape, strides or an offset that no tensor has")
    if meta:
        raise DataError(
            "its pickle holds a tensor that is conjugated or negated when it is read; save it with .clone()"
        )
    return _View(storage, offset, shape, steps)


def _rebuilt_of_dtype(*args: Any) -> _View:
    """A tensor of one of torch's newer number formats, as `torch._utils._rebuild_tensor_v3` makes it."""
    raise _other_numbers(str(args[6]))


def _rebuilt_of_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor that has attributes of its own, as `torch._tensor._rebuild_from_type_v2` makes it."""
    return rebuild(*arguments)


def _parameter(tensor: Any, *rest: Any) -> Any:
    """A parameter of torch: the tensor in it."""
    return tensor


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes, which protocol 2 writes as a text."""
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): None,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuilt_of_type,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuilt_of_dtype,
}
"""What is known besides `TENSOR_NAMES`, to read it or to say what it is."""


def _stand_in(module: str, name: str) -> Any:
    """What an allowed name stands for; a storage's name stands for itself."""
    if name in STORAGE_NAMES:
        return name
    known: dict[str, Any] = {
        "OrderedDict": dict,
        "_rebuild_parameter": _parameter,
        "_rebuild_tensor_v2": _rebuilt,
        "encode": _encoded,
        "dtype": _Dtype,
        "ndarray": _Array,
        "_reconstruct": _Array,
        "_frombuffer": _from_buffer,
    }
    return known[name]


class _Budget:
    """How many bytes may still be unpacked: a small file may name a large part of itself very often."""

    def __init__(self) -> None:
        self._left = LARGEST

    def take(self, size: int) -> None:
        """Count some bytes.

        Raises:
            DataError: they are too many.
        """
        self._left -= size
        if self._left < 0:
            mebibytes = LARGEST >> 20
            raise DataError(f"its pickle unpacks to more than {mebibytes} MiB")


class _Unpickler(RestrictedUnpickler):
    """Remembers the storages that a pickle names."""

    def __init__(self, data: bytes, budget: _Budget) -> None:
        self.stream = io.BytesIO(data)
        self.storages: dict[str, _Storage] = {}
        self._budget = budget
        super().__init__(self.stream, TENSOR_NAMES, _stand_in)

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for.

        Raises:
            DataError: it is of a kind of tensor that no training takes, or no tensor needs it.
        """
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return partial(_from_torch, budget=self._budget)
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module.startswith("torch.") and name in _LAYOUTS:
            what, saved = _LAYOUTS[name]
            raise DataError(f"its pickle holds {what}, not a dense one of floating-point numbers; save it {saved}")

        # A format or a storage of numbers stands for its name, which says later what is refused.
        is_of_torch = module in ("torch", "torch.storage")
        if is_of_torch and (name.endswith("Storage") or _DTYPE.match(name)):
            return name
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of an id: ("storage", type, key, location, size)."""
        kind, storage_type, key = pid[:3]
        if kind != "storage" or not isinstance(storage_type, str):
            shown = str(pid)[:60]
            raise DataError(f"its pickle names {shown}, which is no storage of numbers")
        if storage_type not in _OF_STORAGE:
            raise _other_numbers(_STORAGES.get(storage_type, storage_type))
        storage = _Storage(_OF_STORAGE[storage_type])
        return self.storages.setdefault(str(key), storage)


# Files, by their form.


def read_values(data: bytes, part: str) -> Values:
    """The tensor of a file, `part` being its suffix: ".pth" or ".pickle".

    Raises:
        DataError: there is none that can be trained on, or the file wants to run code.
    """
    refuse_larger(len(data), part)
    try:
        value = _content(data)
        if isinstance(value, _View):
            return _shown(value)
        if isinstance(value, _Array):
            return _shown_array(value.state)
        raise _other_thing(value)
    except DataError as error:
        raise DataError(str(error).replace("its pickle", f"its {part}", 1)) from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        said = str(error)[:80] or type(error).__name__
        raise DataError(f"its {part} cannot be read as a tensor: {said}") from error


def _content(data: bytes) -> Any:
    """What a file holds, whatever its form."""
    budget = _Budget()
    if data[:2] == b"PK":
        return _from_zip(data, budget)
    value = _Unpickler(data, budget).load()
    if type(value) is int and value == _MAGIC:
        return _from_torch(data, budget)
    return value


def _from_torch(data: bytes, budget: _Budget) -> Any:
    """What torch.save wrote, which a pickled tensor carries too.

    The older form is four pickles, the keys of the storages, and the bytes of each.
    """
    budget.take(len(data))
    if data[:2] == b"PK":
        return _from_zip(data, budget)
    reader = _Unpickler(data, budget)
    for _ in range(3):  # magic number, protocol, system
        reader.load()
    found = reader.load()
    for key in reader.load():
        storage = reader.storages[str(key)]
        (size,) = struct.unpack("<q", reader.stream.read(8))
        storage.data = reader.stream.read(size * storage.format.width)
    return found


def _from_zip(data: bytes, budget: _Budget) -> Any:
    """What torch.save's zip file holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # A zip file may unpack to far more than it has.
        members = {member.filename: member for member in archive.infolist()}
        budget.take(sum(member.file_size for member in members.values()))

        # The pickle, and the storages that it names.
        name = next(name for name in members if name.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")
        reader = _Unpickler(_unpacked(archive, data, members[name]), budget)
        value = reader.load()
        order = members.get(f"{folder}byteorder")
        is_swapped = order is not None and _unpacked(archive, data, order) == b"big"
        for key, storage in reader.storages.items():
            found = _unpacked(archive, data, members[f"{folder}data/{key}"])
            storage.data = _swapped(found, storage.format) if is_swapped else found
    return value


def _unpacked(archive: zipfile.ZipFile, data: bytes, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member of a zip file.

    torch.save compresses none, and may be told to write no checksums, which Python's reader would not take.
    """
    if member.compress_type != zipfile.ZIP_STORED:
        return archive.read(member)
    name, extra = struct.unpack_from("<HH", data, member.header_offset + 26)
    start = member.header_offset + 30 + name + extra
    found = data[start : start + member.file_size]
    if member.CRC and zlib.crc32(found) != member.CRC:
        raise DataError(f"its pickle is damaged: {member.filename} has another checksum than was written")
    return found


def _swapped(data: bytes, format_: Format) -> bytes:
    """Numbers with the bytes of each turned round."""
    words = array(format_.swapped_as, data)
    words.byteswap()
    return words.tobytes()


# Windows on bytes.


def _shown(view: _View) -> Values:
    """The window of a tensor of torch.

    Raises:
        DataError: it shows nothing, or more than there is.
    """
    _refuse_size(view.shape, view.storage.format)
    if view.storage.format is _UNTYPED:
        raise _other_numbers("untyped")
    width = view.storage.format.width
    extent = 1
    for size, step in zip(view.shape, view.stride, strict=True):
        extent += (size - 1) * step
    last = view.offset + extent
    there = len(view.storage.data) // width
    if last > there:
        raise DataError(f"its pickle breaks off: its tensor ends at number {last} of a storage that has {there}")
    data = view.storage.data[view.offset * width : last * width]
    return Values(view.storage.format, view.shape, view.stride, data)


def _shown_array(state: Any) -> Values:
    """The window of a numpy array, by its state: (version, shape, dtype, Fortran's order, bytes).

    Raises:
        DataError: it holds other numbers or none, or breaks off.
    """
    _, shape, dtype, is_fortran, raw = state[:5]
    format_ = _OF_NUMPY.get(dtype.text)
    if format_ is None:
        kind, bits = dtype.text[:1], dtype.text[1:]
        if kind not in _KINDS or not bits.isdigit():
            raise _other_numbers(f"numpy's {dtype.text}")
        width = "" if kind == "b" else 8 * int(bits)
        raise _other_numbers(f"{_KINDS[kind]}{width}")
    shape = tuple(shape)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise DataError("its pickle builds an array of a shape that no array has")
    _refuse_size(shape, format_)
    needed = math.prod(shape)
    there = len(raw) // format_.width
    if len(raw) != needed * format_.width:
        raise DataError(f"its pickle breaks off: its array has {needed} numbers, and {there} are there")

    # Big-endian numbers are turned round.
    if dtype.order == ">":
        raw = _swapped(raw, format_)
    return Values(format_, shape, _strides(shape, is_fortran=bool(is_fortran)), raw)


def _refuse_size(shape: tuple[int, ...], format_: Format) -> None:
    """Refuse what has no numbers, or more than a sample may: few bytes can be shown as many.

    Raises:
        DataError: it has none, or more.
    """
    count = math.prod(shape)
    shown = list(shape)
    if not count:
        raise DataError(f"its pickle has shape {shown}, which holds no numbers")
    if count * format_.width > LARGEST:
        mebibytes = LARGEST >> 20
        raise DataError(f"its pickle has shape {shown}, which are more than {mebibytes} MiB")


def _strides(shape: tuple[int, ...], *, is_fortran: bool) -> tuple[int, ...]:
    """Elements from one index of each axis to the next, of numbers without gaps."""
    steps = []
    step = 1
    for size in shape if is_fortran else reversed(shape):
        steps.append(step)
        step *= size
    return tuple(steps if is_fortran else reversed(steps))
