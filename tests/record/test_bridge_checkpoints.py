"""Checkpoints of Megatron-Bridge, judged by their files: of a run of NVIDIA DFM on an H200, and damaged ones."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from dfmspec.data.pickles import BRIDGE_METADATA_NAMES, contents
from dfmspec.errors import CheckpointError
from dfmspec.record import bridge_checkpoints as judge
from dfmspec.record.progress import Progress

RECORDED = Path(__file__).parent / "bridge"
"""What DFM 7cb7634 wrote, but for the shards."""
PLAN = "sha256:1"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of checkpoints with one of iteration 40, whose shards are as long as they were."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(RECORDED, folder)
    of_40 = folder / "iter_0000040"
    metadata = contents((of_40 / ".metadata").read_bytes(), BRIDGE_METADATA_NAMES, holds="it", is_zip=False)
    ends: dict[str, int] = {}
    for entry in metadata.state["storage_data"].values():
        name = entry.state["relative_path"]
        ends[name] = max(ends.get(name, 0), entry.state["offset"] + entry.state["length"])
    assert ends
    for name, end in ends.items():
        with (of_40 / name).open("wb") as shard:
            shard.truncate(end)
    judge.own_folder(folder, PLAN)
    return folder


def progress(folder: Path) -> Progress:
    return Progress.of(None, folder)


def test_a_recorded_checkpoint_is_whole(saved: Path) -> None:
    assert judge.problem(saved / "iter_0000040") is None
    assert judge.tracked(saved) == 40
    assert judge.committed(saved) == [saved / "iter_0000040"]
    assert judge.manifest_digest(saved / "iter_0000040").startswith("sha256:")
    judge.check_start(progress(saved), PLAN, {})


def test_a_shard_that_is_short_or_gone_is_named(saved: Path) -> None:
    shard = next((saved / "iter_0000040").glob("*.distcp"))
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    short = judge.problem(saved / "iter_0000040")
    shard.unlink()
    gone = judge.problem(saved / "iter_0000040")

    assert short == f"{shard.name} has {size - 1} bytes, and its tensors reach to {size}"
    assert gone == f"{shard.name} is missing"


@pytest.mark.parametrize("name", [".metadata", "common.pt", "train_state.pt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04N.", None])
def test_what_cannot_be_read_is_told(saved: Path, name: str, content: bytes | None) -> None:
    file = saved / "iter_0000040" / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)

    assert (judge.problem(saved / "iter_0000040") or "").startswith(f"its {name}")


def test_a_checkpoint_under_another_number_is_told(saved: Path) -> None:
    (saved / "iter_0000040").rename(saved / "iter_0000050")

    assert judge.problem(saved / "iter_0000050") == "its train_state.pt is of iteration 40"


class Program:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def test_a_program_is_not_run(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "iter_0000040" / ".metadata").write_bytes(pickle.dumps(Program()))

    assert "wants to run builtins.print" in (judge.problem(saved / "iter_0000040") or "")
    assert capsys.readouterr().out == ""


def test_a_run_that_would_begin_anew_is_refused(saved: Path) -> None:
    (saved / "latest_train_state.pt").unlink()
    committed = progress(saved)._replace(iteration=40, witness="manifest.json")

    with pytest.raises(CheckpointError, match=r"would go on from iteration 0 .* but iteration 40 was committed"):
        judge.check_start(committed, PLAN, {})


def test_a_checkpoint_that_is_gone_or_damaged_is_refused_before_it_is_gone_on_from(saved: Path) -> None:
    (saved / "iter_0000040" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be used: its common.pt"):
        judge.check_start(progress(saved), PLAN, {})
    shutil.rmtree(saved / "iter_0000040")
    with pytest.raises(CheckpointError, match=r"cannot be used: it is gone"):
        judge.check_start(progress(saved), PLAN, {})


def test_a_damaged_tracker_is_told(saved: Path) -> None:
    (saved / "latest_train_state.pt").write_bytes(b"PK")

    with pytest.raises(CheckpointError, match=r"latest_train_state.pt is damaged.*copy train_state.pt"):
        judge.tracked(saved)


@pytest.mark.parametrize("theirs", [None, "sha256:2"])
def test_the_checkpoints_of_another_plan_are_refused(saved: Path, theirs: str | None) -> None:
    (saved / judge.OWNER_OF_FOLDER).unlink()
    if theirs is not None:
        judge.own_folder(saved, theirs)

    with pytest.raises(CheckpointError, match=r"run.resume="):
        judge.check_start(progress(saved), PLAN, {})
    judge.check_start(progress(saved)._replace(is_named=True), PLAN, {})


def test_a_checkpoint_of_dfmspecs_own_trainer_is_none_of_upstreams(saved: Path) -> None:
    (saved / "iter_0000040" / "manifest.json").write_text("{}")

    assert judge.problem(saved / "iter_0000040") == "it is dfmspec's (it has manifest.json)"


def test_a_start_elsewhere_must_be_there(saved: Path, tmp_path: Path) -> None:
    begins = progress(tmp_path / "new")
    judge.check_start(begins, PLAN, {"load": str(saved)})
    judge.check_start(begins, PLAN, {"load": str(saved), "ckpt_step": 40})

    with pytest.raises(CheckpointError, match=r"has no checkpoint to resume from"):
        judge.check_start(begins, PLAN, {"load": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match=r"it is gone"):
        judge.check_start(begins, PLAN, {"load": str(saved), "ckpt_step": 20})


def test_a_shard_outside_of_the_checkpoint_is_refused(saved: Path) -> None:
    file = saved / "iter_0000040" / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"__0_0.distcp", b"../../../etc"))

    assert judge.problem(saved / "iter_0000040") == "its .metadata names ../../../etc, which is outside of it"


def test_no_damage_of_a_trainings_state_is_anything_but_told(saved: Path) -> None:
    file = saved / "latest_train_state.pt"
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        for bit in (0, 3, 7):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                found = judge.tracked(saved)
            except CheckpointError as error:
                assert "latest_train_state.pt is damaged" in str(error)
            else:
                assert isinstance(found, int)
