"""Pickles from disk, read without trust: the names that each kind of file may use, and one reader that knows no others.

A pickle names what is called to build its objects, so a hostile one runs anything. The reader looks each name up in a
white list before anything is imported. What a name stands for is the caller's: the thing itself, or a stand-in.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from dfmspec.errors import DataError

Name = tuple[str, str]
"""(module, name in it)."""
Binder = Callable[[str, str], Any]
"""What an allowed name stands for."""

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
STREAM_NAMES: frozenset[Name] = TENSOR_NAMES | {
    (f"{_ENERGON}.savable_loader", "SavableCheckpoint"),
    (f"{_ENERGON}.savable_loader", "SavableDataLoaderState"),
    (f"{_ENERGON}.savable_loader", "SavableDatasetCheckpoint"),
    (f"{_ENERGON}.savable_loader", "SavableDatasetState"),
    (f"{_ENERGON}.flavors.webdataset.sample_loader", "SliceState"),
    (f"{_ENERGON}.rng", "SystemRngState"),
    (f"{_ENERGON}.state", "FlexState"),
    ("torch", "ByteStorage"),
}
"""What the state of a stream needs: the states of Energon's loaders, and of random number generators."""


def itself(module: str, name: str) -> Any:
    """The binder of the real thing: imports it."""
    return getattr(import_module(module), name)


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

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the pickle stands for."""
        if (module, name) in self._allowed:
            return self._binder(module, name)
        if module == "torch" and name in STORAGE_NAMES:
            return self._binder(module, name)
        if module.partition(".")[0] in ("torch", "numpy"):
            raise DataError(f"its pickle holds {module}.{name}, and no tensor of floating-point numbers")
        raise DataError(f"its pickle wants to run {module}.{name}, which {self._holds} does not need")
