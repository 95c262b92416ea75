"""Where a training starts, by run.resume, checkpoint.load, checkpoint.save and checkpoint.ckpt_step."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.errors import CheckpointError
from dfmspec.record.progress import Identity, Progress
from dfmspec.record.start import Asked, start_of
from dfmspec.spec.resume import Resume
from tests.record.made import CONFIG, checkpoint


def damaged(folder: Path, iteration: int) -> Path:
    """A checkpoint of which a file was cut short."""
    path = checkpoint(folder, iteration)
    (path / "common.pt").write_bytes(b"stat")
    return path


def start(
    value: str | int, load: Path, save: Path | None = None, step: int | None = None
) -> tuple[Path | None, list[str]]:
    """Where it starts, and what was told on the way."""
    told: list[str] = []
    asked = Asked(Resume.parse(value), load, step)
    found = start_of(asked, Progress.of(None, save or load), Identity(CONFIG, None), told.append)
    return found, told


def test_auto_goes_on_from_the_newest_whole_checkpoint_and_tells_what_it_passes_over(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    newest_whole = checkpoint(tmp_path, 4)
    damaged(tmp_path, 6)
    found, told = start("auto", tmp_path)

    assert found == newest_whole
    assert len(told) == 1
    assert "iter_0000006 is passed over" in told[0]


def test_the_newest_is_that_of_the_highest_number(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9_999_999)
    newest = checkpoint(tmp_path, 10_000_000)

    assert start("auto", tmp_path)[0] == newest


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

    assert start(2, tmp_path / "ckpts", tmp_path / "own")[0] == second
    assert start("auto", tmp_path / "ckpts", tmp_path / "own", step=2)[0] == second
    assert start(str(tmp_path / "ckpts"), tmp_path / "none")[0] == fourth


def test_none_whole_is_an_error_and_never_a_fresh_start(tmp_path: Path) -> None:
    damaged(tmp_path, 2)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        start("auto", tmp_path)


def test_a_start_before_the_newest_would_leave_two_histories(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match="has a checkpoint of iteration 4, after the 2 to start from"):
        start("auto", tmp_path, step=2)
