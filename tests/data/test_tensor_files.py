"""What a sample's files may hold: the checks and the trainer refuse the same, whatever its kind."""

from __future__ import annotations

import io
import pickle
import random
import tarfile
from pathlib import Path

import pytest
import torch

from dfmspec.data.inspection import inspect
from dfmspec.data.pickles import LARGEST
from dfmspec.data.shards import scan
from dfmspec.data.tensors import read_tensor
from dfmspec.errors import DataError
from dfmspec.trainer.data.decode import load_context, load_latent
from tests.data.faulty import CONTAINERS, FAULTS, LATENT, LAYOUTS, TEXT, made

# torch has much to say of its rarer kinds.
pytestmark = pytest.mark.filterwarnings("ignore:.*")


def _written(folder: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, files in samples.items():
            for part, data in files.items():
                member = tarfile.TarInfo(f"{key}.{part}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _of_trainer(files: dict[str, bytes]) -> str:
    """What the trainer refuses a sample for; empty: nothing."""
    try:
        load_latent(files["pth"])
        load_context(files["pickle"])
    except DataError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def samples() -> dict[str, dict[str, bytes]]:
    """200 random samples, of which either file is of any kind, and what each is."""
    chance = random.Random(7)
    good = {
        "pth": CONTAINERS["zip"](torch.randn(LATENT)),
        "pickle": CONTAINERS["pickle 4"](torch.randn(TEXT)),
        "json": b"{}",
    }
    found: dict[str, dict[str, bytes]] = {}
    while len(found) < 200:
        part, shape = chance.choice([("pth", LATENT), ("pickle", TEXT)])
        file = made(chance, shape)
        if file:
            found[f"{len(found):03} {part} {file.kind}".replace(".", "_")] = {**good, part: file.data}
    return found


def test_what_the_trainer_refuses_the_checks_do_in_the_same_words(
    samples: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    _written(tmp_path, samples)
    said = {sample.place.removesuffix(" of a.tar"): sample.problem for sample in scan(tmp_path, limit=200).samples}

    assert said == {key: _of_trainer(files) for key, files in samples.items()}
    assert 40 < sum(bool(problem) for problem in said.values()) < 160


def test_one_bad_sample_does_not_hide_the_others(samples: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    first = dict(list(samples.items())[:60])
    _written(tmp_path, first)
    bad = sum(bool(_of_trainer(files)) for files in first.values())

    assert sum(problem.startswith("sample ") for problem in inspect(tmp_path)["problems"]) == bad


def test_what_can_be_trained_on_comes_out_as_it_was_saved() -> None:
    chance = random.Random(11)
    files = [file for file in (made(chance, LATENT) for _ in range(300)) if file and file.tensor is not None]
    assert len(files) > 80
    for file in files:
        loaded = load_latent(file.data)
        assert torch.equal(loaded.float(), file.tensor.float()), file.kind
        assert loaded.device.type == "cpu", file.kind
        assert not loaded.requires_grad, file.kind
        without_torch = read_tensor(file.data, ".pth")
        assert without_torch.largest == float(file.tensor.double().abs().max()), file.kind
        assert without_torch.mean == pytest.approx(float(file.tensor.double().mean()), abs=1e-6), file.kind


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("none", "largest of fp32")])
def test_no_fault_passes_by_any_form_of_file(fault: str, container: str) -> None:
    value = FAULTS[fault](torch.randn(LATENT, dtype=torch.float64))
    with pytest.raises(DataError, match=r"^its \.pth "):
        load_latent(CONTAINERS[container](value))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("sparse", r"holds a sparse tensor, .*save it with \.to_dense\(\)"),
        ("quantized", r"holds a quantized tensor, .*save it with \.dequantize\(\)"),
        ("nested", "holds a nested tensor"),
        ("meta", "holds a tensor of the meta device, without values"),
    ],
)
def test_a_layout_that_is_refused_is_named(layout: str, words: str) -> None:
    for container in ("zip", "older form", "pickle 2", "pickle 5"):
        with pytest.raises(DataError, match=words):
            load_latent(CONTAINERS[container](LAYOUTS[layout](torch.randn(LATENT))))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int32, "int32"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
        (torch.uint16, "uint16"),
    ],
)
def test_numbers_that_are_refused_are_named_with_what_is_needed(dtype: torch.dtype, name: str) -> None:
    wanted = (
        rf"holds {name} values, not floating-point numbers of 16, 32 or 64 bits; save it with \.to\(torch\.bfloat16\)"
    )
    for container in ("zip", "older form", "pickle 2", "pickle 5"):
        with pytest.raises(DataError, match=wanted):
            load_latent(CONTAINERS[container](torch.zeros(LATENT, dtype=dtype)))


def test_a_flipped_bit_of_a_zip_file_is_found_by_its_checksum() -> None:
    data = bytearray(CONTAINERS["zip"](torch.zeros(LATENT)))
    data[data.index(bytes(192))] = 1
    with pytest.raises(DataError, match="another checksum than was written"):
        load_latent(bytes(data))


def test_bytes_that_are_named_again_and_again_are_not_read_again_and_again() -> None:
    torch_file = CONTAINERS["older form"](torch.zeros(2**18))
    opening = b"ctorch.storage\n_load_from_bytes\nq\x00"
    named = b"B" + len(torch_file).to_bytes(4, "little") + torch_file + b"q\x01"
    again = b"h\x00h\x01\x85R0" * 5000
    with pytest.raises(DataError, match="unpacks to more than"):
        read_tensor(b"\x80\x03" + opening + b"0" + named + b"0" + again + b"N.", ".pickle")


def test_a_file_that_is_too_large_is_refused_by_its_size() -> None:
    with pytest.raises(DataError, match=f"{LARGEST} are the most that are read"):
        read_tensor(bytes(LARGEST + 1), ".pth")


def test_a_pickle_that_names_itself_endlessly_is_a_damaged_file() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(DataError, match="holds a list"):
        read_tensor(pickle.dumps(value), ".pickle")
