"""Files are written whole, follow no link that others planted, and leave nothing aside."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from dfmspec.files import write_aside, write_named


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text("old")
    write_aside(file, "new")

    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "manifest.json").symlink_to(tmp_path / "victim")
    write_aside(tmp_path / "manifest.json", "new")

    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "manifest.json").is_symlink()


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError, match=str(file)):
            write_aside(file, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("old")
    (tmp_path / "link").symlink_to("report")
    write_named(tmp_path / "link", "new")

    assert (tmp_path / "report").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_pipe_that_the_user_names_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    write_named(Path(f"/dev/fd/{writer}"), "new")
    os.close(writer)

    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_what_is_no_text_is_escaped(tmp_path: Path) -> None:
    write_named(tmp_path / "report", "caf\udce9")

    assert (tmp_path / "report").read_text() == "caf\\udce9"
