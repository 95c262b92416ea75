"""Which checkpoint a path means, and whose it is when it means none."""

from __future__ import annotations

from pathlib import Path

import pytest

from dfmspec.errors import CheckpointError
from dfmspec.record.checkpoints import find
from dfmspec.record.locate import locate


def of_bridge(folder: Path) -> Path:
    """A checkpoint as Megatron-Bridge leaves it."""
    checkpoint = folder / "iter_0000100"
    checkpoint.mkdir(parents=True)
    for name in ("common.pt", ".metadata", "metadata.json", "run_config.yaml", "train_state.pt", "__0_0.distcp"):
        (checkpoint / name).touch()
    return checkpoint


@pytest.mark.parametrize("of_one", [True, False])
def test_samples_and_exports_are_told_whose_a_checkpoint_is(of_one: bool, tmp_path: Path) -> None:
    checkpoint = of_bridge(tmp_path)

    with pytest.raises(CheckpointError, match=r"iter_0000100 is Megatron-Bridge's \(it has run_config.yaml\)"):
        locate(checkpoint if of_one else tmp_path, print)


def test_a_run_directory_of_nothing_is_no_other_programs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        locate(tmp_path, print)


@pytest.mark.parametrize("iteration", [None, 100])
def test_a_training_is_told_whose_a_checkpoint_is(iteration: int | None, tmp_path: Path) -> None:
    of_bridge(tmp_path)

    with pytest.raises(CheckpointError, match=r"Megatron-Bridge's \(it has run_config.yaml\)"):
        find(tmp_path, iteration=iteration, report=print, digests={})


def test_a_copy_that_broke_off_is_not_taken_for_another_programs(tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000100"
    checkpoint.mkdir()
    for name in ("common.pt", ".metadata", "metadata.json"):
        (checkpoint / name).touch()

    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        find(tmp_path, iteration=None, report=print, digests={})
