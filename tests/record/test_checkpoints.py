"""A checkpoint vouches for itself, and needs no trust."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dfmspec.record.checkpoints import committed, problem
from dfmspec.spec.checkpoints import MANIFEST
from tests.conftest import dfmspec
from tests.formats.test_formats import WRITTEN
from tests.record.made import FILES, checkpoint, zipped

REAL = next(WRITTEN.glob("runs/tiny/2*/checkpoints/iter_0000004"))


class Gadget:
    """Runs a command when it is unpickled by whoever trusts it."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


class Nested:
    """A pickle in a pickle, by way of a name that tensors need."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        import torch

        return torch.storage._load_from_bytes, (self.data,)


class Named:
    """Asks for a name of a module that is trusted for another."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def program() -> bytes:
    """What torch.jit.save writes looks like torch.save's, and is run by torch.load."""
    file = io.BytesIO(zipped({}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
    return file.getvalue()


def two_pickles(gadget: Gadget) -> bytes:
    """Which of two members of one name is read, depends on who reads."""
    file = io.BytesIO(zipped({}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps(gadget))
    return file.getvalue()


def hostile(file: Path) -> dict[str, tuple[str, bytes]]:
    """name -> (file of a checkpoint, what somebody put there)."""
    import torch

    gadget = Gadget(str(file))
    legacy = io.BytesIO()
    torch.save(gadget, legacy, _use_new_zipfile_serialization=False)
    nested = zipped(Nested(zipped(gadget)))
    stream = "streams/stream_00000.pt"
    return {
        "metadata": (".metadata", pickle.dumps(gadget)),
        "metadata, protocol 0": (".metadata", pickle.dumps(gadget, protocol=0)),
        "metadata, a torch name": (".metadata", pickle.dumps(Named(torch.hub.load, "a", "b"))),
        "metadata, a builtin": (".metadata", pickle.dumps(Named(eval, "1"))),
        "common": ("common.pt", zipped(gadget)),
        "common, nested": ("common.pt", nested),
        "common, older form": ("common.pt", legacy.getvalue()),
        "common, program": ("common.pt", program()),
        "stream": (stream, zipped(gadget)),
        "stream, nested": (stream, nested),
        "stream, program": (stream, program()),
        "stream, two pickles": (stream, two_pickles(gadget)),
    }


NAMES = sorted(hostile(Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_what_wants_to_run_something_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    file, data = hostile(tmp_path / "ran")[name]
    path = checkpoint(tmp_path, 4, files={**FILES, file: data})
    fault = problem(path)

    assert fault is not None
    assert fault.startswith(f"{file} is not trusted")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("command", "name"), [("sample", "metadata"), ("export", "common")])
def test_no_command_runs_what_is_in_a_checkpoint(command: str, name: str, tmp_path: Path) -> None:
    file, data = hostile(tmp_path / "ran")[name]
    shutil.copytree(REAL, tmp_path / REAL.name)
    replace(tmp_path / REAL.name, file, data)
    words = [command, tmp_path / REAL.name, "--out", tmp_path / "out"]
    done = dfmspec(*words)

    assert done.returncode == 1, done.stderr
    assert "is not trusted" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def replace(path: Path, file: str, data: bytes) -> None:
    """Put other content into a checkpoint, with the size and checksum that its manifest then needs."""
    from zlib import crc32

    (path / file).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][file] = {"size": len(data), "crc32": f"{crc32(data):08x}"}
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_what_earlier_versions_wrote_is_whole() -> None:
    written = [path for folder in WRITTEN.glob("runs/*/2*/checkpoints") for path in committed(folder)]

    assert written
    for path in written:
        assert problem(path) is None, path


@pytest.mark.parametrize("key", ["format_version", "iteration", "config_digest", "config", "files"])
def test_a_key_without_which_it_says_nothing_is_missed(key: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest[key]
    (path / MANIFEST).write_text(json.dumps(manifest))
    fault = problem(path)

    assert fault is not None
    assert key in fault


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_file_that_is_not_listed_is_missed(file: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4, files={name: data for name, data in FILES.items() if name != file})
    fault = problem(path)

    assert (fault is None) == (file == "__0_0.distcp")  # how many shards there are depends on the layout


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "streams/../../x", "n" * 300])
def test_a_listed_file_is_in_the_checkpoint(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "crc32": "00000000"}
    (path / MANIFEST).write_text(json.dumps(manifest))

    assert problem(path) is not None


def test_a_swapped_folder_is_known_by_its_name(tmp_path: Path) -> None:
    four = checkpoint(tmp_path, 4)
    six = checkpoint(tmp_path, 6)
    four.rename(tmp_path / "aside")
    six.rename(four)
    (tmp_path / "aside").rename(six)

    assert problem(four) == "its manifest.json is that of iteration 6"
    assert problem(six) == "its manifest.json is that of iteration 4"


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    """200 of them, anywhere in any file, the manifest among them."""
    rng = random.Random(0)
    path = checkpoint(tmp_path, 4)
    files = [MANIFEST, *FILES]
    passed = []
    for _ in range(200):
        file = path / rng.choice(files)
        whole = file.read_bytes()
        place = rng.randrange(len(whole))
        bit = 1 << rng.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        changed = json_of(file) != json.loads(whole) if file.name == MANIFEST else True
        if problem(path) is None and changed and '"plan_id"' not in line_of(whole, place):
            passed.append((file.name, place, bit))
        file.write_bytes(whole)

    assert passed == []


def json_of(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None


def line_of(text: bytes, place: int) -> str:
    """The line around a place: the plan's id is vouched for by the run's record alone."""
    start = text.rfind(b"\n", 0, place) + 1
    return text[start : text.find(b"\n", place)].decode(errors="replace")


def test_an_object_in_a_shard_is_never_unpickled(tmp_path: Path) -> None:
    """torch unpickles the objects of a distributed checkpoint without a list of names; linear layers have such."""
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    path = Path(shutil.copytree(REAL, tmp_path / REAL.name))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    objects = {name for name, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    assert objects
    gadget = io.BytesIO()
    torch.save(Gadget(str(tmp_path / "ran")), gadget)
    for index, place in metadata.storage_data.items():
        if index.fqn in objects:
            shard = path / place.relative_path
            place.offset = shard.stat().st_size
            place.length = len(gadget.getvalue())
            replace(path, place.relative_path, shard.read_bytes() + gadget.getvalue())
    replace(path, ".metadata", pickle.dumps(metadata))
    assert problem(path) is None

    done = dfmspec("export", path, "--out", tmp_path / "out", "--raw")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
