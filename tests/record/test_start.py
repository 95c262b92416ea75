"""Where a training starts, by run.resume, checkpoint.load, checkpoint.save and checkpoint.ckpt_step."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import pytest

from dfmspec.errors import CheckpointError
from dfmspec.record.start import start_of
from dfmspec.spec.checkpoints import MANIFEST
from dfmspec.spec.iterations import folder_of
from dfmspec.spec.resume import Resume


def checkpoint(folder: Path, iteration: int, *, whole: bool = True) -> Path:
    """A checkpoint of one file."""
    path = folder / folder_of(iteration)
    path.mkdir(parents=True)
    (path / "common.pt").write_bytes(b"state" if whole else b"stat")
    files = {"common.pt": {"size": 5, "crc32": f"{crc32(b'state'):08x}"}}
    (path / MANIFEST).write_text(json.dumps({"iteration": iteration, "files": files}))
    return path


def start(
    value: str | int, load: Path, save: Path | None = None, step: int | None = None
) -> tuple[Path | None, list[str]]:
    """Where it starts, and what was told on the way."""
    told: list[str] = []
    found = start_of(Resume.parse(value), load=load, save=save or load, step=step, report=told.append)
    return found, told


def test_auto_goes_on_from_the_newest_whole_checkpoint_and_tells_what_it_passes_over(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    newest_whole = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6, whole=False)
    found, told = start("auto", tmp_path)

    assert found == newest_whole
    assert len(told) == 1
    assert "iter_0000006 is passed over" in told[0]


def test_auto_starts_afresh_where_there_is_nothing(tmp_path: Path) -> None:
    assert start("auto", tmp_path / "none") == (None, [])


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000002.tmp-1a2b3c4d").mkdir()

    assert start("auto", tmp_path) == (None, [])
    assert start("never", tmp_path) == (None, [])


def test_auto_goes_on_with_its_own_rather_than_where_it_came_from(tmp_path: Path) -> None:
    came_from = checkpoint(tmp_path / "other", 8)
    assert start("auto", tmp_path / "other", tmp_path / "own")[0] == came_from

    own = checkpoint(tmp_path / "own", 10)
    assert start("auto", tmp_path / "other", tmp_path / "own")[0] == own


@pytest.mark.parametrize(
    ("value", "step", "message"),
    [
        ("never", None, "has checkpoints and run.resume is never"),
        (3, None, "has no checkpoint of iteration 3; it has: 4, 2"),
        ("auto", 3, "has no checkpoint of iteration 3; it has: 4, 2"),
        ("{empty}", None, "has no checkpoint to resume from"),
    ],
)
def test_what_cannot_be_is_an_error(value: str | int, step: int | None, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpts", 2)
    checkpoint(tmp_path / "ckpts", 4)
    (tmp_path / "empty").mkdir()
    if isinstance(value, str):
        value = value.format(empty=tmp_path / "empty")
    with pytest.raises(CheckpointError, match=message):
        start(value, tmp_path / "ckpts", step=step)


def test_an_iteration_or_a_folder_is_where_it_starts(tmp_path: Path) -> None:
    second = checkpoint(tmp_path / "ckpts", 2)
    fourth = checkpoint(tmp_path / "ckpts", 4)

    assert start(2, tmp_path / "ckpts")[0] == second
    assert start("auto", tmp_path / "ckpts", step=2)[0] == second
    assert start(str(tmp_path / "ckpts"), tmp_path / "none")[0] == fourth


def test_none_whole_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, whole=False)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        start("auto", tmp_path)
