"""What a folder of checkpoints holds, as rules and trainers see it."""

from __future__ import annotations

import random
from pathlib import Path

from dfmspec.record.checkpoints import committed, iteration_of
from dfmspec.spec.checkpoints import MANIFEST, committed_iterations, is_committed, of_another
from dfmspec.spec.iterations import folder_of

NAMES = (MANIFEST, ".metadata", "metadata.json", "common.pt", "__0_0.distcp", "run_config.yaml", "train_state.pt")


def _folders(place: Path, count: int) -> list[Path]:
    """Folders of checkpoints, each with files drawn at random."""
    draw = random.Random(28)
    made = []
    for i in range(count):
        folder = place / str(i)
        for iteration in draw.sample(range(1, 500), 4):
            checkpoint = folder / folder_of(iteration)
            checkpoint.mkdir(parents=True)
            for name in draw.sample(NAMES, draw.randint(0, len(NAMES))):
                (checkpoint / name).touch()
        made.append(folder)
    return made


def test_rules_and_the_trainer_know_the_same_checkpoints(tmp_path: Path) -> None:
    for folder in _folders(tmp_path, 50):
        seen_by_the_trainer = sorted(iteration_of(path) for path in committed(folder))

        assert committed_iterations(folder, own=True) == seen_by_the_trainer


def test_a_committed_checkpoint_is_nobody_elses_and_another_programs_is_not_committed(tmp_path: Path) -> None:
    for folder in _folders(tmp_path, 50):
        for checkpoint in folder.iterdir():
            whose = of_another(checkpoint, own=True)
            of_bridge = (checkpoint / "run_config.yaml").exists() or (checkpoint / "train_state.pt").exists()

            assert (whose is not None) == (of_bridge and not is_committed(checkpoint, own=True))


def test_upstream_goes_by_what_megatron_core_writes_last(tmp_path: Path) -> None:
    for name in ("metadata.json", ".metadata", "common.pt"):
        (tmp_path / name).touch()
        assert is_committed(tmp_path, own=False) == (name != "common.pt")
        (tmp_path / name).unlink()
