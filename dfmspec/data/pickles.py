"""Pickles from disk, read without trust: the names that each kind of file may use, and one reader that knows no others.

A pickle names what is called to build its objects, so a hostile one runs anything. The reader looks each name up in a
white list before anything is imported. What a name stands for is the caller's: the thing itself, or a stand-in.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from dfmspec.errors import DataError

Name = tuple[str, str]
"""(module, name in it)."""
Binder = Callable[[str, str], Any]
"""What an allowed name stands for."""

LARGEST = 256 * 2**20
"""Bytes that are read of a sample's file, of the tensor in it, and of a pickle in a zip file."""

TENSOR_NAMES: frozenset[Name] = frozenset(
    {
        # torch.save's, and torch tensors in a pickle of protocol 2 to 5.
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.storage", "_load_from_bytes"),
        # numpy arrays: protocols 2 to 4 rebuild them, protocol 5 takes their buffer; numpy 2 renamed the modules.
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
    }
)
"""What a tensor or an array of numbers needs, by whichever protocol it was pickled."""

STORAGE_NAMES = ("BFloat16Storage", "DoubleStorage", "FloatStorage", "HalfStorage")
"""torch's storages of floating-point numbers, which a tensor in torch's older form names."""


_ENERGON = "megatron.energon"
STREAM_NAMES: frozenset[Name] = (TENSOR_NAMES - {("torch.storage", "_load_from_bytes")}) | {
    (f"{_ENERGON}.savable_loader", "SavableCheckpoint"),
    (f"{_ENERGON}.savable_loader", "SavableDataLoaderState"),
    (f"{_ENERGON}.savable_loader", "SavableDatasetCheckpoint"),
    (f"{_ENERGON}.savable_loader", "SavableDatasetState"),
    (f"{_ENERGON}.flavors.webdataset.sample_loader", "SliceState"),
    (f"{_ENERGON}.rng", "SystemRngState"),
    (f"{_ENERGON}.state", "FlexState"),
    ("torch", "ByteStorage"),
}
"""What the state of a stream needs: the states of Energon's loaders, and of random number generators.

Its tensors are members of torch.save's zip file; a pickle inside the pickle would be read by nobody's rules.
"""

_CHECKPOINT = "torch.distributed.checkpoint"
METADATA_NAMES: frozenset[Name] = frozenset(
    {
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
        (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "Metadata"),
        (f"{_CHECKPOINT}.metadata", "MetadataIndex"),
        (f"{_CHECKPOINT}.metadata", "StorageMeta"),
        (f"{_CHECKPOINT}.metadata", "TensorProperties"),
        (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"),
        (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch", "bfloat16"),
        ("torch", "float16"),
        ("torch", "float32"),
        ("torch", "float64"),
        ("torch", "int32"),
        ("torch", "int64"),
        ("torch", "uint8"),
        ("torch.serialization", "_get_layout"),
    }
)
"""What torch's description of a distributed checkpoint needs: which tensor lies where, of which shape and format."""
BRIDGE_METADATA_NAMES: frozenset[Name] = METADATA_NAMES | {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    (f"{_CHECKPOINT}.planner", "TensorWriteData"),
    (f"{_CHECKPOINT}.planner", "WriteItem"),
    (f"{_CHECKPOINT}.planner", "WriteItemType"),
}
"""The same as the megatron-core writes it that NVIDIA DFM pins."""
ENUM_NAMES: frozenset[Name] = frozenset(
    {
        (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_CHECKPOINT}.planner", "WriteItemType"),
    }
)
"""Enumerations among these. Python up to 3.11.3 pickles a member as `getattr(enumeration, its name)`."""
TRAIN_STATE_NAMES: frozenset[Name] = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "BoolStorage"),
        ("torch", "DoubleStorage"),
        ("torch", "FloatStorage"),
        ("torch", "IntStorage"),
        ("torch", "LongStorage"),
    }
)
"""What Megatron-Bridge's state of a training needs: a tensor of one number each."""
COMMON_NAMES: frozenset[Name] = TENSOR_NAMES - {("torch.storage", "_load_from_bytes")}
"""What megatron-core keeps beside the shards: plain values, and tensors among them."""


def itself(module: str, name: str) -> Any:
    """The binder of the real thing: imports it."""
    return getattr(import_module(module), name)


ANY_NAME: frozenset[Name] = frozenset()
"""For `contents` alone: every name, since none stands for anything."""


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles what uses the allowed names alone.

    Raises:
        DataError: the pickle asks for another name.
    """

    def __init__(
        self, stream: IO[bytes], allowed: frozenset[Name], binder: Binder = itself, *, holds: str = "a tensor"
    ) -> None:
        """`holds`: what is meant to be in the pickle, for its errors."""
        super().__init__(stream)
        self._allowed = allowed
        self._binder = binder
        self._holds = holds
        self._enumerations: list[Any] = []

    def _member(self, enumeration: Any, name: Any) -> Any:
        """A member of an enumeration by its name: all that `getattr` may be asked for.

        Raises:
            DataError: it is asked of something else, or for something that is no member's name.
        """
        is_one = any(enumeration is known for known in self._enumerations)
        if not is_one or not isinstance(name, str) or re.fullmatch("[A-Z][A-Z0-9_]*", name) is None:
            raise DataError(f"its pickle wants to run builtins.getattr, which {self._holds} does not need")
        return getattr(enumeration, name, None)

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        if (module, name) == ("builtins", "getattr") and self._allowed & ENUM_NAMES:
            return self._member
        if (module, name) in self._allowed & ENUM_NAMES:
            enumeration = self._binder(module, name)
            self._enumerations.append(enumeration)
            return enumeration
        if (module, name) in self._allowed:
            return self._binder(module, name)
        if module == "torch" and name in STORAGE_NAMES:
            return self._binder(module, name)
        of_numbers = module.partition(".")[0] in ("torch", "numpy")
        if of_numbers and self._allowed == TENSOR_NAMES:
            raise DataError(f"its pickle holds {module}.{name}, and no tensor of floating-point numbers")
        raise DataError(f"its pickle wants to run {module}.{name}, which {self._holds} does not need")


class _Inert:
    """Stands for anything that a pickle builds, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


def _inert(module: str, name: str) -> Any:
    """The binder of nothing: imports nothing, and builds nothing; an enumeration is told from all else."""
    return type(name, (_Inert,), {}) if (module, name) in ENUM_NAMES else _Inert


class _Reader(RestrictedUnpickler):
    """Goes through a pickle to its end, with storages left where they are."""

    def persistent_load(self, pid: Any) -> _Inert:
        """What stands for a storage."""
        return _Inert()


def look_through(data: bytes, allowed: frozenset[Name], *, holds: str, is_zip: bool) -> None:
    """Go through a pickle and see that it uses the allowed names alone.

    Nothing is imported or built. Whatever reads the file next calls nothing else either.

    Args:
        data: the file.
        allowed: the names that it may use.
        holds: what is meant to be in it, for its errors.
        is_zip: the pickle is a member of torch.save's zip file; its older form has several, one after the other.

    Raises:
        DataError: it uses another name, or is no such file.
    """
    try:
        pickled = _pickle_in(data) if is_zip else data
        _Reader(io.BytesIO(pickled), allowed, _inert, holds=holds).load()
    except DataError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        said = str(error)[:80] or type(error).__name__
        raise DataError(f"it cannot be read: {said}") from error


class Kept:
    """Stands for an object of a pickle, and keeps what it was to be made of."""

    name = ""
    """`module.name` of what it stands for."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None
        self.items: dict[Any, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, item: Any) -> None:
        """What a list is filled with."""

    def extend(self, items: Any) -> None:
        """What a list is filled with."""


def _keeping(module: str, name: str) -> Any:
    """The binder of what keeps: imports nothing, and runs nothing."""
    return type("Kept", (Kept,), {"name": f"{module}.{name}", "__new__": lambda cls, *_: object.__new__(cls)})


class _Keeper(RestrictedUnpickler):
    """Reads a pickle into plain values, with a Kept in place of every object."""

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        if self._allowed is ANY_NAME:
            return _keeping(module, name)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Kept:
        """What stands for a storage."""
        return Kept(pid)


def contents(data: bytes, allowed: frozenset[Name], *, holds: str, is_zip: bool) -> Any:
    """What a pickle holds, as plain values: nothing is imported or run, and a `Kept` stands in place of every object.

    Args:
        data: the file.
        allowed: the names that it may use; ANY_NAME: whichever.
        holds: what is meant to be in it, for its errors.
        is_zip: the pickle is a member of torch.save's zip file.

    Raises:
        DataError: it uses another name, or is no such file.
    """
    try:
        pickled = _pickle_in(data) if is_zip else data
        return _Keeper(io.BytesIO(pickled), allowed, _keeping, holds=holds).load()
    except DataError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        said = str(error)[:80] or type(error).__name__
        raise DataError(f"it cannot be read: {said}") from error


_INTEGERS = {"torch.IntStorage": 4, "torch.LongStorage": 8}
"""Storages of integers, and the bytes of one."""


def integer_in(data: bytes, value: Any) -> int | None:
    """The number that a tensor of one integer holds; None: it is none.

    Args:
        data: the file of torch.save that it is from.
        value: what `contents` made of it.
    """
    try:
        storage, offset = value.args[:2]
        _, kind, key, *_ = storage.args[0]
        size = _INTEGERS[kind.name]
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            member = next(name for name in archive.namelist() if name.endswith(f"/data/{key}"))
            if archive.getinfo(member).file_size > LARGEST:
                return None
            stored = archive.read(member)[offset * size : (offset + 1) * size]
    except Exception:  # a damaged file raises whatever its bytes lead to
        return None
    return int.from_bytes(stored, "little", signed=True) if len(stored) == size else None


def _pickle_in(data: bytes) -> bytes:
    """The pickle of torch.save's zip file.

    Raises:
        DataError: there is none, more than one, or a program.
    """
    if not data.startswith(b"PK\x03\x04"):  # what comes before a zip file may be read as another form
        raise DataError("it is no file of torch.save")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [Path(entry.filename).name.lower() for entry in archive.infolist()]
        if names.count("data.pkl") != 1 or "constants.pkl" in names:
            raise DataError("it is no file of torch.save")
        entry = archive.infolist()[names.index("data.pkl")]
        if entry.file_size > LARGEST:
            mebibytes = LARGEST >> 20
            raise DataError(f"its pickle unpacks to more than {mebibytes} MiB")
        return archive.read(entry)
