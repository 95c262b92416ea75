"""What a pickle of a sample may hold: both readers, with and without torch, take the same names by every protocol."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfmspec.data.pickles import METADATA_NAMES, TENSOR_NAMES, RestrictedUnpickler, look_through
from dfmspec.data.tensors import read_tensor
from dfmspec.errors import DataError
from dfmspec.trainer.data.decode import load_context, load_latent

PROTOCOLS = (2, 3, 4, 5)
TEXT = np.arange(12, dtype=np.float32).reshape(3, 4)
TEXTS = {
    "float16": TEXT.astype(np.float16),
    "float32": TEXT,
    "float64": TEXT.astype(np.float64),
    "big-endian": TEXT.astype(">f4"),
    "torch": torch.from_numpy(TEXT),
    "bfloat16": torch.from_numpy(TEXT).bfloat16(),
    "parameter": torch.nn.Parameter(torch.from_numpy(TEXT)),
}


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/dfmspec-was-here",)


class OfTorch:
    def __reduce__(self) -> tuple[Any, ...]:
        return torch.load, ("/etc/hostname",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_embedding_is_read_alike_with_and_without_torch(kind: str, protocol: int) -> None:
    data = pickle.dumps(TEXTS[kind], protocol=protocol)
    without_torch = read_tensor(data, ".pickle")
    with_torch = load_context(data)

    assert without_torch.shape == (3, 4)
    assert without_torch.largest == 11
    assert torch.equal(with_torch.float(), torch.from_numpy(TEXT))
    assert not with_torch.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_latent_is_read_alike_with_and_without_torch(dtype: torch.dtype, zipped: bool) -> None:
    buffer = io.BytesIO()
    latent = torch.arange(32, dtype=dtype).reshape(2, 1, 4, 4)
    torch.save(latent, buffer, _use_new_zipfile_serialization=zipped)

    assert read_tensor(buffer.getvalue(), ".pth").shape == (2, 1, 4, 4)
    assert torch.equal(load_latent(buffer.getvalue()), latent)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("hostile", [Attack(), OfTorch()], ids=["of the system", "of torch"])
def test_any_other_name_is_refused_before_it_is_imported(hostile: object, protocol: int) -> None:
    data = pickle.dumps(hostile, protocol=protocol)
    for read in (lambda: read_tensor(data, ".pickle"), lambda: load_context(data)):
        with pytest.raises(DataError):
            read()

    assert not Path("/tmp/dfmspec-was-here").exists()


def asked_for(*words: bytes) -> bytes:
    """A pickle that calls `getattr`, as Python 3.11.2 writes a member of an enumeration, with two arguments."""
    return b"\x80\x02cbuiltins\ngetattr\n" + b"".join(words) + b"\x86R."


ENUMERATION = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"


@pytest.mark.parametrize(
    ("pickled", "is_taken"),
    [
        (asked_for(ENUMERATION, b"X\x17\x00\x00\x00TORCH_CONTIGUOUS_FORMAT"), True),
        (asked_for(ENUMERATION, b"X\x0b\x00\x00\x00__members__"), False),
        (asked_for(ENUMERATION, b"X\x03\x00\x00\x00mro"), False),
        (asked_for(b"cpathlib\nPosixPath\n", b"X\x06\x00\x00\x00unlink"), False),
        (asked_for(b"cpathlib\nPosixPath\n", b"X\x06\x00\x00\x00UNLINK"), False),
        (asked_for(b"cbuiltins\ngetattr\n", b"X\x01\x00\x00\x00A"), False),
    ],
)
def test_a_member_of_an_enumeration_is_all_that_getattr_gives(pickled: bytes, is_taken: bool) -> None:
    if is_taken:
        look_through(pickled, METADATA_NAMES, holds="a checkpoint", is_zip=False)
        member = RestrictedUnpickler(io.BytesIO(pickled), METADATA_NAMES).load()
        assert member.name == "TORCH_CONTIGUOUS_FORMAT"
        return
    for read in (
        lambda: look_through(pickled, METADATA_NAMES, holds="a checkpoint", is_zip=False),
        lambda: RestrictedUnpickler(io.BytesIO(pickled), METADATA_NAMES).load(),
    ):
        with pytest.raises(DataError, match=r"builtins\.getattr"):
            read()
    with pytest.raises(DataError, match=r"builtins\.getattr"):
        look_through(asked_for(ENUMERATION, b"X\x01\x00\x00\x00A"), TENSOR_NAMES, holds="a tensor", is_zip=False)
