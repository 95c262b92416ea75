"""Stopped anywhere and resumed, a run is bitwise the one that was not stopped; checkpoints are whole or absent."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfmspec.record import checkpoints
from dfmspec.record.events import read_events
from tests.conftest import environment
from tests.trainer.training import ENTRY, SHORT, awake, finish, kill_tree, losses, place, start, train, wait_for

ITERATIONS = "train.train_iters=6"


@pytest.fixture(scope="module")
def setting(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the runs here have in common; they set out with all weights awake."""
    words = ["data.num_streams=4", "train.global_batch_size=2", f"dataset.path={dataset}"]
    return [*words, ITERATIONS, awake(tmp_path_factory.mktemp("awake"), *words)]


@pytest.fixture(scope="module")
def whole(setting: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six iterations that nothing stopped, saved at 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(run_dir, *setting)
    return run_dir


def cut(whole: Path, run_dir: Path, last: int) -> Path:
    """What a run leaves that died after its checkpoint of iteration `last`."""
    shutil.copytree(whole, run_dir, symlinks=True)
    (run_dir / "events.jsonl").unlink()
    for path in checkpoints.committed(run_dir / "checkpoints"):
        if checkpoints.iteration_of(path) > last:
            shutil.rmtree(path)
    tracker = run_dir / "checkpoints" / checkpoints.TRACKER
    tracker.write_text(f"{last}\n")
    if last == 0:
        tracker.unlink()
    return run_dir


def states(run_dir: Path) -> dict[tuple[int, str], str]:
    """Checksums of the shards of each checkpoint: weights, averages, fp32 weights and moments."""
    found = {}
    for path in checkpoints.committed(run_dir / "checkpoints"):
        files = json.loads((path / "manifest.json").read_text())["files"]
        found |= {
            (checkpoints.iteration_of(path), name): facts["crc32"]
            for name, facts in files.items()
            if name.endswith(".distcp")
        }
    return found


def assert_continues(run_dir: Path, whole: Path, *, exact: bool = True) -> None:
    """The losses and norms are those of `whole`; if `exact`, so is every bit of the checkpoints that both have."""
    if exact:
        mine = states(run_dir)
        theirs = states(whole)
        both = mine.keys() & theirs.keys()
        assert both
        assert {key: mine[key] for key in both} == {key: theirs[key] for key in both}
    expected, actual = losses(whole), losses(run_dir)
    assert actual
    for iteration, values in actual.items():
        ((loss, norm),), ((expected_loss, expected_norm),) = values, expected[iteration]
        if exact:
            assert (loss, norm) == (expected_loss, expected_norm)
        else:
            assert loss == pytest.approx(expected_loss, rel=1e-6)
            assert norm == pytest.approx(expected_norm, rel=1e-5)


def test_the_directories_are_the_how_tos(whole: Path) -> None:
    folder = whole / "checkpoints"

    assert sorted(path.name for path in folder.iterdir()) == [
        "iter_0000002",
        "iter_0000004",
        "iter_0000006",
        checkpoints.TRACKER,
    ]
    assert (folder / checkpoints.TRACKER).read_text() == "6\n"
    assert all(checkpoints.problem(path) is None for path in checkpoints.committed(folder))


def test_each_iteration_has_the_time_that_it_took(whole: Path) -> None:
    """The last one too, whose loss is read at once."""
    seconds = [event["seconds"] for event in read_events(whole / "events.jsonl") if event["type"] == "iteration"]

    assert min(seconds) > 0.1 * sorted(seconds)[len(seconds) // 2]


@pytest.mark.parametrize("last", [2, 4])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(
    last: int, whole: Path, setting: list[str], tmp_path: Path
) -> None:
    run_dir = cut(whole, tmp_path / "run", last)
    assert f"Resumed from iteration {last}" in train(run_dir, *setting)

    assert sorted(losses(run_dir)) == list(range(last + 1, 7))
    assert_continues(run_dir, whole)


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_checkpoints_written_beside_the_training_are_those_of_their_iteration(
    distributed: str, whole: Path, setting: list[str], tmp_path: Path
) -> None:
    run_dir, optimizer = cut(whole, tmp_path / "run", 0), f"optimizer.use_distributed_optimizer={distributed}"
    train(run_dir, *setting, optimizer, "checkpoint.async_save=true", "checkpoint.save_interval=1", processes=2)
    assert [path.name for path in checkpoints.committed(run_dir / "checkpoints")] == [
        f"iter_000000{i}" for i in range(6, 0, -1)
    ]

    resumed = cut(run_dir, tmp_path / "resumed", 3)
    train(resumed, *setting, optimizer, "checkpoint.async_save=true", processes=2)
    assert_continues(resumed, run_dir)


@pytest.mark.long
def test_a_blend_of_datasets_goes_on_where_it_was(dataset: Path, setting: list[str], tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\n"
        f"splits: {{train: {{blend: [{{weight: 3, path: {dataset}}}, "
        f"{{weight: 1, path: {dataset}, split_part: val}}]}}, val: {{path: {dataset}}}}}\n"
    )
    words = [*setting, f"dataset.path={tmp_path / 'mix.yaml'}"]
    train(tmp_path / "whole", *words)
    resumed = cut(tmp_path / "whole", tmp_path / "resumed", 4)
    train(resumed, *words)

    assert sorted(losses(resumed)) == [5, 6]
    assert_continues(resumed, tmp_path / "whole")


def test_loader_processes_do_not_change_the_data(whole: Path, setting: list[str], tmp_path: Path) -> None:
    run_dir = cut(whole, tmp_path / "run", 0)
    train(run_dir, *setting, "dataset.num_workers=1")

    assert_continues(run_dir, whole)


def test_a_run_goes_on_with_a_loader_process_that_began_without_and_the_reverse(
    whole: Path, setting: list[str], tmp_path: Path
) -> None:
    with_process = cut(whole, tmp_path / "with", 2)
    train(with_process, *setting, "dataset.num_workers=1")
    assert sorted(losses(with_process)) == [3, 4, 5, 6]
    assert_continues(with_process, whole)

    without = cut(with_process, tmp_path / "without", 4)
    train(without, *setting, "dataset.num_workers=0")
    assert sorted(losses(without)) == [5, 6]
    assert_continues(without, whole)


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["model.tensor_model_parallel_size=2"],
        ["model.pipeline_model_parallel_size=2"],
        ["model.context_parallel_size=2"],
    ],
)
def test_a_run_continues_in_another_layout_with_the_same_data(
    layout: list[str], whole: Path, setting: list[str], tmp_path: Path
) -> None:
    """DP 1 to DP 2, TP 2, PP 2 and CP 2: the losses agree, which they do not when one sample is repeated or skipped."""
    run_dir = cut(whole, tmp_path / "run", 2)
    train(run_dir, *setting, *layout, processes=2)

    assert sorted(losses(run_dir)) == [3, 4, 5, 6]
    assert_continues(run_dir, whole, exact=False)


def test_evaluations_leave_the_training_as_it_is(setting: list[str], tmp_path: Path) -> None:
    """Their samples are read while another thread reads the training's, here or in loader processes."""
    words = [*setting, "dataset.packing_buffer_size=40", "data.num_streams=16", "train.eval_iters=3"]
    train(tmp_path / "here", *words, "dataset.num_workers=0", "train.eval_interval=1")
    train(tmp_path / "there", *words, "dataset.num_workers=1", "train.eval_interval=2")

    assert [event["type"] for event in read_events(tmp_path / "here" / "events.jsonl")].count("evaluation") == 6
    assert losses(tmp_path / "here") == losses(tmp_path / "there")


def test_a_resumed_run_has_the_rate_that_it_is_given(whole: Path, setting: list[str], tmp_path: Path) -> None:
    """The checkpoint's own would hide it: what a message advises must be possible."""
    run_dir = cut(whole, tmp_path / "run", 2)
    train(run_dir, *setting, "optimizer.lr=3e-5", "scheduler.lr_decay_style=constant", "scheduler.lr_warmup_iters=0")

    assert {event["lr"] for event in read_events(run_dir / "events.jsonl") if event["type"] == "iteration"} == {3e-5}


def test_another_network_is_refused(whole: Path, setting: list[str], tmp_path: Path) -> None:
    words = [*setting, "model.num_layers=1", "model.adaln_lora_rank=8", "checkpoint.pretrained_checkpoint=null"]
    said = train(cut(whole, tmp_path / "run", 2), *words, expect=1)

    assert "is of another network: model.num_layers is 2, not 1, model.adaln_lora_rank is 16, not 8" in said
    assert "Traceback" not in said


def test_another_number_of_streams_is_refused(whole: Path, setting: list[str], tmp_path: Path) -> None:
    run_dir = cut(whole, tmp_path / "run", 2)
    said = train(run_dir, *setting, "data.num_streams=2", expect=1)

    assert "has 4 streams and this run 2; give data.num_streams=4" in said


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_loudly(
    damage: str, whole: Path, setting: list[str], tmp_path: Path
) -> None:
    run_dir = cut(whole, tmp_path / "run", 4)
    shard = next((run_dir / "checkpoints" / "iter_0000004").glob("*.distcp"))
    data = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(data[:1000] if damage == "truncated" else data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    said = train(run_dir, *setting)

    assert "iter_0000004 is passed over" in said
    assert "Resumed from iteration 2" in said
    assert_continues(run_dir, whole)


@pytest.mark.long
def test_a_run_that_is_past_its_end_says_so(whole: Path, setting: list[str], tmp_path: Path) -> None:
    said = train(cut(whole, tmp_path / "run", 6), *setting, "train.train_iters=4")

    assert "Nothing to train: iteration 6 is reached, and train.train_iters is 4" in said


def test_nothing_whole_is_an_error_and_never_a_fresh_start(whole: Path, setting: list[str], tmp_path: Path) -> None:
    run_dir = cut(whole, tmp_path / "run", 2)
    (run_dir / "checkpoints" / "iter_0000002" / "common.pt").unlink()
    said = train(run_dir, *setting, expect=1)

    assert "none of the 1 checkpoints" in said
    assert "run.resume=never" in said


def test_sigterm_finishes_the_iteration_and_saves(setting: list[str], whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    process = start(
        run_dir, *SHORT, *setting, "checkpoint.save_interval=100", processes=0, DFMSPEC_RUN_DIR=str(run_dir)
    )
    while not losses(run_dir):
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)

    assert code == 0, err[-2000:]
    (stopped,) = checkpoints.committed(run_dir / "checkpoints")[:1]
    assert checkpoints.iteration_of(stopped) == max(losses(run_dir))
    if checkpoints.iteration_of(stopped) < 6:
        assert "Stopped by signal 15" in out
        train(run_dir, *setting)
    assert_continues(run_dir, whole)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.long)])
def test_sigkill_at_any_moment_loses_nothing_committed(
    seed: int, whole: Path, setting: list[str], tmp_path: Path
) -> None:
    """Killed while saving or between, as often as it takes: every loss is that of the run that was not stopped."""
    run_dir, rng = tmp_path / "run", random.Random(seed)
    run_dir.mkdir()
    words = [*setting, "checkpoint.save_interval=1"]
    process = start(run_dir, *SHORT, *words, processes=0, DFMSPEC_RUN_DIR=str(run_dir))
    wait_for(run_dir / "checkpoints", 120)
    time.sleep(rng.uniform(0, 3))
    if process.poll() is None:
        kill_tree(process)
    before = [path.name for path in checkpoints.committed(run_dir / "checkpoints")]
    assert all(checkpoints.problem(path) is None for path in checkpoints.committed(run_dir / "checkpoints"))
    train(run_dir, *words)

    assert all((run_dir / "checkpoints" / name).exists() for name in before)
    assert not list((run_dir / "checkpoints").glob("*.tmp-*"))
    assert_continues(run_dir, whole)


def test_a_damaged_checkpoint_is_kept_aside_when_its_iteration_is_saved_again(
    whole: Path, setting: list[str], tmp_path: Path
) -> None:
    run_dir = cut(whole, tmp_path / "run", 4)
    (run_dir / "checkpoints" / "iter_0000004" / "common.pt").write_bytes(b"x")
    train(run_dir, *setting)
    folder = run_dir / "checkpoints"

    assert checkpoints.problem(folder / "iter_0000004") is None
    assert len(list(folder.glob("iter_0000004.damaged-*"))) == 1


def test_a_run_never_starts_before_checkpoints_that_it_would_contradict(
    whole: Path, setting: list[str], tmp_path: Path
) -> None:
    run_dir = cut(whole, tmp_path / "run", 6)
    said = train(run_dir, *setting, "checkpoint.ckpt_step=2", expect=1)
    assert "has a checkpoint of iteration 6, after the 2 to start from; give checkpoint.save another folder" in said

    train(
        run_dir,
        *setting,
        "checkpoint.ckpt_step=2",
        f"checkpoint.load={run_dir}/checkpoints",
        f"checkpoint.save={tmp_path}/other",
    )
    assert_continues(run_dir, whole)
    assert [path.name for path in checkpoints.committed(tmp_path / "other")] == ["iter_0000006", "iter_0000004"]


def test_a_full_disk_costs_checkpoints_and_then_stops_the_run_with_nothing_lost(
    whole: Path, setting: list[str], tmp_path: Path
) -> None:
    """Files may not grow past 100 kB: every save fails, training goes on, the third failure in a row ends it."""
    run_dir = cut(whole, tmp_path / "run", 2)
    limit = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", limit, ENTRY, *SHORT, *setting, "checkpoint.save_interval=1"]
    env = environment(DFMSPEC_RUN_DIR=str(run_dir))
    result = subprocess.run(
        command, cwd=place(run_dir), env=env, capture_output=True, text=True, timeout=240, check=False
    )
    folder = run_dir / "checkpoints"

    assert result.returncode == 4
    assert result.stdout.count("[WARNING] Checkpoint of iteration") == 3
    assert "is the disk full?" in result.stdout
    assert sorted(losses(run_dir)) == [3, 4, 5]
    assert [path.name for path in checkpoints.committed(folder)] == ["iter_0000002"]
    assert not list(folder.glob("*.tmp-*"))
    assert "Traceback" not in result.stderr


def test_checkpoints_are_pruned_but_never_below_two(setting: list[str], tmp_path: Path) -> None:
    train(tmp_path / "run", *setting, "checkpoint.save_interval=1", "checkpoint.most_recent_k=1")

    assert [path.name for path in checkpoints.committed(tmp_path / "run" / "checkpoints")] == [
        "iter_0000006",
        "iter_0000005",
    ]


def test_damaged_checkpoints_take_no_place_among_those_that_are_kept(
    whole: Path, setting: list[str], tmp_path: Path
) -> None:
    run_dir = cut(whole, tmp_path / "run", 6)
    for iteration in (4, 6):
        (run_dir / "checkpoints" / f"iter_000000{iteration}" / "common.pt").write_bytes(b"x")
    train(run_dir, *setting, "checkpoint.save_interval=1", "checkpoint.most_recent_k=2", "train.train_iters=3")

    whole_ones = [
        path.name for path in checkpoints.committed(run_dir / "checkpoints") if checkpoints.problem(path) is None
    ]
    assert whole_ones == ["iter_0000003", "iter_0000002"]


def test_a_rank_that_cannot_read_its_shard_back_costs_that_checkpoint_alone(setting: list[str], tmp_path: Path) -> None:
    script = tmp_path / "entry.py"
    script.write_text(f"""
import os, runpy
from dfmspec.trainer.checkpoint import writer as checkpoint

def crc32s(paths, real=checkpoint.crc32s):
    checkpoint.crc32s = real
    if os.environ["RANK"] == "1":
        raise OSError(5, "Input/output error")
    return real(paths)

checkpoint.crc32s = crc32s
runpy.run_path({ENTRY!r}, run_name="__main__")
""")
    words = [
        *SHORT,
        *setting,
        "train.train_iters=4",
        "model.tensor_model_parallel_size=2",
        "dist.distributed_timeout_minutes=1",
    ]
    code, out, err = finish(start(tmp_path, *words, processes=2, script=str(script), DFMSPEC_RUN_DIR=str(tmp_path)))

    assert code == 0, err[-2000:]
    assert "[WARNING] Checkpoint of iteration 2 not saved: [Errno 5] Input/output error" in out
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("iter*")) == ["iter_0000004"]


def test_a_full_disk_keeps_events_waiting_but_for_those_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from dfmspec.trainer import report

    monkeypatch.setattr(report.dist, "get_rank", lambda: 0)
    reporter = report.Reporter(train_iters=1, tensorboard_dir=None, events="/dev/full")
    reporter.event("iteration", iteration=1)

    with pytest.raises(OSError, match="No space left"):
        reporter.event("finished", iteration=1)


def test_a_line_that_was_cut_short_takes_no_event_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dfmspec.trainer import report

    monkeypatch.setattr(report.dist, "get_rank", lambda: 0)
    (tmp_path / "events.jsonl").write_text(
        '{"type": "evaluation", "time": 1, "iteration": 1, "loss": 1.0}\n{"type": "iteration", "lo'
    )
    for iteration in (2, 3):
        reporter = report.Reporter(train_iters=1, tensorboard_dir=None, events=tmp_path / "events.jsonl")
        reporter.event("finished", iteration=iteration)
        reporter.close()

    assert [event["iteration"] for event in read_events(tmp_path / "events.jsonl")] == [1, 2, 3]


def test_a_checkpoint_is_sampled_from_in_one_process(whole: Path, tmp_path: Path) -> None:
    from tests.conftest import dfmspec

    result = dfmspec(
        "sample",
        whole,
        "--num-samples",
        2,
        "--num-steps",
        3,
        "--out",
        tmp_path / "out",
        "--caption",
        "blue butterfly",
        "--caption",
        "x",
    )

    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "grid.png",
        "sample_000.png",
        "sample_001.png",
    ]
    assert json.loads((checkpoints.committed(whole / "checkpoints")[0] / "manifest.json").read_text())["iteration"] == 6


def test_pictures_do_not_replace_pictures(tmp_path: Path) -> None:
    for name in ("samples", "samples-2", "samples-3"):
        free = checkpoints.unused(tmp_path / "samples")
        free.mkdir()

        assert free == tmp_path / name
