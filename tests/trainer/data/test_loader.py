"""A loader process stays until the rank has saved, is missed when it is lost, and is no part of a stream's state."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from dfmspec.errors import LoaderError
from dfmspec.record import checkpoints
from dfmspec.trainer.data.loader import _Answers, _in_a_loader_process, end_loaders
from tests.trainer.training import SHORT, Process, finish, losses, start

FORK = multiprocessing.get_context("fork")


class NotSent:
    """A sample that cannot be pickled, such as one with a lambda in it."""

    def __reduce__(self) -> Any:
        raise TypeError("this cannot be sent")


def sleep_as_a_loader(ready: Any) -> None:
    _in_a_loader_process(lambda worker: None, 0)
    ready.set()
    time.sleep(60)


def send_as_a_loader(queue: Any) -> None:
    _in_a_loader_process(lambda worker: None, 0)
    queue.put(NotSent())
    time.sleep(60)


def test_signals_to_the_whole_job_leave_a_loader_process_and_the_rank_ends_it() -> None:
    ready = FORK.Event()
    loader = FORK.Process(target=sleep_as_a_loader, args=(ready,))
    loader.start()
    assert ready.wait(20)
    assert loader.pid is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(loader.pid, number)
    loader.join(0.3)
    assert loader.is_alive()

    end_loaders()
    assert loader.exitcode == -signal.SIGKILL


def test_what_cannot_be_sent_ends_the_loader_process_instead_of_being_waited_for() -> None:
    loader = FORK.Process(target=send_as_a_loader, args=(FORK.Queue(),))
    loader.start()
    loader.join(20)

    assert loader.exitcode == 1


def test_an_answer_of_a_process_that_is_gone_is_not_waited_for() -> None:
    gone: BaseProcess = FORK.Process(target=os._exit, args=(3,))
    gone.start()
    gone.join()
    with pytest.raises(LoaderError, match=r"has ended with 3; when nobody did that, .* memory ran out"):
        _Answers(FORK.Queue(), [gone]).get()


@pytest.fixture
def words(dataset: Path) -> list[str]:
    """A training without end, with a loader process."""
    return [
        *SHORT,
        f"dataset.path={dataset}",
        "dataset.num_workers=1",
        "data.num_streams=1",
        "train.global_batch_size=2",
        "train.train_iters=100000",
        "checkpoint.save_interval=100000",
    ]


def begun(run_dir: Path, words: list[str]) -> tuple[Process, list[psutil.Process]]:
    """A training that has told of an iteration, and its loader processes."""
    run_dir.mkdir()
    process = start(run_dir, *words, processes=0, DFMSPEC_RUN_DIR=str(run_dir))
    while not losses(run_dir):
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()
    loaders = psutil.Process(process.pid).children(recursive=True)
    assert loaders
    return process, loaders


def test_a_signal_to_every_process_saves_the_run(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process, loaders = begun(run_dir, words)
    for each in loaders:
        each.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process, 60)

    assert code == 0, err[-2000:]
    assert "Stopped by signal 15" in out
    (saved,) = checkpoints.committed(run_dir / "checkpoints")
    assert checkpoints.iteration_of(saved) == max(losses(run_dir))
    assert checkpoints.problem(saved) is None
    assert not [each for each in loaders if each.is_running()]


def test_no_loader_process_outlives_a_rank_that_was_killed(words: list[str], tmp_path: Path) -> None:
    process, loaders = begun(tmp_path / "run", words)
    process.kill()
    _, alive = psutil.wait_procs(loaders, timeout=30)

    assert not alive


def test_a_loader_process_that_was_killed_is_named_and_no_shard(words: list[str], tmp_path: Path) -> None:
    process, loaders = begun(tmp_path / "run", words)
    for each in loaders:
        each.kill()
    code, _, err = finish(process, 60)

    assert code == 1
    assert "a loader process was killed" in err
    assert "memory ran out" in err
    assert "damaged shard" not in err
