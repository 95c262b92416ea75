"""Files of a run are written whole, follow no link, and leave nothing aside."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from dfmspec.record.files import json_object, read_json, write_aside


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


@pytest.mark.parametrize("text", ["[]", "null", "{", "[" * 100_000, ""])
def test_what_is_no_object_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json_object(text.encode())


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ordinary file"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="no ordinary file"):
        read_json(Path("/dev/zero"))
