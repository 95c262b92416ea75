"""What a stranger's file is read of: regular files up to a size, and of YAML so many values."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dfmspec.bounded import METADATA_VALUES, TooLarge, TooMuch, load_yaml, read_beginning, read_bytes, read_text


@pytest.fixture
def special(tmp_path: Path) -> dict[str, Path]:
    """One file of each kind that is no regular file."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket"))
    return {
        "a pipe": tmp_path / "fifo",
        "Is a directory": tmp_path / "folder",
        "a socket": tmp_path / "socket",
        "a device": Path("/dev/zero"),
    }


@pytest.mark.parametrize("kind", ["a pipe", "Is a directory", "a socket", "a device"])
def test_what_is_no_regular_file_is_refused_at_once_by_its_kind(special: dict[str, Path], kind: str) -> None:
    with pytest.raises(OSError, match=kind):
        read_bytes(special[kind], most=100)


def test_a_file_is_read_to_its_last_byte_and_one_more_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x" * 100)

    assert read_bytes(file, most=100) == b"x" * 100
    with pytest.raises(TooLarge, match="more than 99 bytes"):
        read_bytes(file, most=99)


def test_of_a_file_of_any_size_the_beginning_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    os.truncate(file, 2**40)

    assert read_beginning(file, most=5) == b"abc\0\0"
    file.write_bytes(b"abc")
    assert read_beginning(file, most=5) == b"abc"


def test_a_pipe_that_may_be_one_is_read_to_its_end_but_not_beyond_the_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('x' * 100)"
    for most in (100, 99):
        with subprocess.Popen([sys.executable, "-c", write, tmp_path / "fifo"]):
            if most == 100:
                assert read_bytes(tmp_path / "fifo", most=most, may_be_a_pipe=True) == b"x" * 100
            else:
                with pytest.raises(TooLarge):
                    read_bytes(tmp_path / "fifo", most=most, may_be_a_pipe=True)


def test_lines_end_in_a_text_as_they_do_where_python_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"a\r\nb\rc\n")

    assert read_text(file, most=100) == file.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "m0: &m0 {x: 1, y: 2}\nm: {<<: [" + "*m0, " * METADATA_VALUES + "]}",
        "m0: &m0 [1]\n" + "\n".join(f"m{n}: &m{n} [*m{n - 1}, *m{n - 1}]" for n in range(1, 40)),
        "m: &m [*m]",
        "m: [" + "1, " * METADATA_VALUES + "]",
        "- " * 2000,
        "%TAG !a! b\n" * 200 + "--- {}",
    ],
    ids=["merges", "aliases", "itself", "values", "depth", "directives"],
)
def test_metadata_that_grows_when_it_is_built_is_too_much(text: str) -> None:
    with pytest.raises(TooMuch):
        load_yaml(text, yaml.CSafeLoader)


def test_merge_keys_and_aliases_that_stand_for_little_are_read() -> None:
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]"

    assert load_yaml(text, yaml.SafeLoader) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}
