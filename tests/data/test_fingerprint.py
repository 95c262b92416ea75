"""The fingerprint of a dataset."""

from __future__ import annotations

from pathlib import Path

from dfmspec.data.fingerprint import fingerprint


def made(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    for name, content in (("a.tar", b"one"), ("inner/b.tar", b"three"), ("notes.txt", b"x"), ("a.tar.idx", b"y")):
        (folder / name).write_bytes(content)
    return folder


def test_shards_count_by_name_and_size_wherever_they_lie(tmp_path: Path) -> None:
    one = fingerprint(made(tmp_path / "one"), deep=True) or {}
    other = fingerprint(made(tmp_path / "other"), deep=True) or {}

    assert (one["shards"], one["bytes"]) == (2, 8)
    assert (one["sizes"], one["content"]) == (other["sizes"], other["content"])
    assert one["path"] != other["path"]


def test_another_size_and_another_content_are_seen(tmp_path: Path) -> None:
    folder = made(tmp_path / "one")
    before = fingerprint(folder, deep=True) or {}
    (folder / "a.tar").write_bytes(b"two")
    changed = fingerprint(folder, deep=True) or {}
    (folder / "a.tar").rename(folder / "c.tar")
    renamed = fingerprint(folder) or {}

    assert changed["sizes"] == before["sizes"]
    assert changed["content"] != before["content"]
    assert renamed["sizes"] != before["sizes"]
    assert "content" not in renamed


def test_no_folder_has_none(tmp_path: Path) -> None:
    assert fingerprint(tmp_path / "nothing") is None
