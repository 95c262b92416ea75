"""One stream's Energon loader: packs, their state, and a loader process that neither outlives the rank nor is lost.

A signal to the whole job is the rank's affair: the loader process stays until the rank has saved with its help.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.queues
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
from megatron.energon.state import FlexState

from dfmspec.errors import DataError, LoaderError, TrainingError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.task_encoder import PackedSample, TaskEncoder, raise_data_error

_ENERGON = threading.Lock()
"""Energon notes its active loader once for all threads, and an evaluation's loaders are read while another thread reads
the training's."""
_SHUFFLE_SEQUENCE = 100
"""Samples read in a row from one place of a shard before jumping to another."""
_SECONDS_BETWEEN_LOOKS = 1.0
"""How often a loader process that owes an answer is looked at."""
_SECONDS_TO_BE_GONE = 0.5
"""How long a loader process that may have ended is waited for."""


class EnergonPacks:
    """One Energon loader; at most one worker process, which keeps the order that it has without.

    Raises a DataError for a pack that cannot be read, and a LoaderError when the loader process is lost.
    """

    def __init__(self, experiment: Experiment, split: str, stream: int) -> None:
        dataset = experiment.dataset
        part = "train" if dataset.use_train_split_for_val else split
        self._place = f"split {part} of {dataset.path}"

        # An evaluation reads in order, and in this process.
        workers = 0
        shuffle_buffer_size = None
        sequence = None
        if split == "train":
            workers = min(dataset.num_workers, 1)
            shuffle_buffer_size = dataset.shuffle_buffer_size
            sequence = _SHUFFLE_SEQUENCE

        worker_config = WorkerConfig(
            rank=stream,
            world_size=experiment.data.num_streams,
            num_workers=workers,
            seed_offset=experiment.rng.seed,
            global_error_handler=raise_data_error,
        )
        samples = get_train_dataset(
            dataset.path,
            split_part=part,
            worker_config=worker_config,
            batch_size=None,
            packing_buffer_size=dataset.packing_buffer_size,
            shuffle_buffer_size=shuffle_buffer_size,
            max_samples_per_sequence=sequence,
            task_encoder=TaskEncoder(experiment),
        )
        self._loader: SavableDataLoader = get_savable_loader(samples)
        self._loader.worker_init_fn = partial(_in_a_loader_process, self._loader.worker_init_fn)
        self._packs: Iterator[PackedSample] | None = None
        self._processes: list[BaseProcess] = []
        self._to_skip = 0
        """Packs after the restored state that were used before."""

    def __next__(self) -> PackedSample:
        try:
            with _ENERGON:
                if self._packs is None:
                    self._packs = self._started()
                for _ in range(self._to_skip):
                    next(self._packs)
                self._to_skip = 0
                return next(self._packs)
        except Exception as error:  # a sample's fault, or whatever a damaged shard leads Energon to
            raise self._told(error) from error

    def _started(self) -> Iterator[PackedSample]:
        """The packs of the loader, whose process is running now."""
        before = multiprocessing.active_children()
        packs = iter(self._loader)
        if not self._loader.num_workers:
            return packs
        first = next(packs)  # only now does the process start
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        answers = [_Answers(each, self._processes) for each in self._loader.result_queues]
        self._loader.result_queues = answers
        return _after(first, packs)

    def _told(self, error: Exception) -> TrainingError:
        """What is said of an error while a pack is read."""
        if isinstance(error, LoaderError):
            return error

        # From a loader process comes its whole traceback as one text; the last line says what it was.
        text = str(error).strip() or type(error).__name__
        last = text.splitlines()[-1]
        if isinstance(error, DataError):
            return DataError(last.rpartition("SampleError: ")[2])
        if "shared memory" in text or ("No space left on device" in text and self._loader.num_workers):
            return LoaderError(
                f"a loader process found no room in /dev/shm: {last}; give the container more "
                "(docker --shm-size, a memory volume of the pod), or set dataset.num_workers=0"
            )
        # Whatever is said of the connection to a process that is gone, it is gone.
        for process in self._processes:
            process.join(_SECONDS_TO_BE_GONE)  # the connection breaks a moment before
        gone = _ended(self._processes)
        if gone is not None:
            return gone
        return DataError(f"{self._place} cannot be read: {last}; dfmspec validate --check data names the damaged shard")

    def state(self) -> Any:
        """Energon's state of the loader.

        Raises:
            LoaderError: the loader process is gone, and its state with it.
        """
        with _ENERGON:
            return self._loader.save_state_rank()

    def restore(self, state: Any) -> None:
        """Go on where Energon's `state` was taken, with a loader process or without, whichever it was then."""
        if state is not None:
            state, self._to_skip = _converted(state, has_process=self._loader.num_workers > 0)
        with _ENERGON:
            self._loader.restore_state_rank(state)


def _after(first: PackedSample, rest: Iterator[PackedSample]) -> Iterator[PackedSample]:
    yield first
    yield from rest


def _ended(processes: Sequence[BaseProcess]) -> LoaderError | None:
    """The error of a loader process that is gone; None: all are there."""
    for process in processes:
        if not process.is_alive():
            how = "was killed" if process.exitcode == -signal.SIGKILL else f"has ended with {process.exitcode}"
            return LoaderError(
                f"a loader process {how}; when nobody did that, the machine's memory ran out (see dmesg): "
                "lower dataset.packing_buffer_size"
            )
    return None


class _Answers:
    """The queue of a loader process's answers, which is not waited at in vain."""

    def __init__(self, answers: Any, processes: Sequence[BaseProcess]) -> None:
        self._answers = answers
        self._processes = processes

    def get(self) -> Any:
        """The next answer.

        Raises:
            LoaderError: nobody is left to give it.
        """
        while True:
            try:
                return self._answers.get(timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Empty:
                gone = _ended(self._processes)
            if gone is not None:
                raise gone


def _in_a_loader_process(prepare: Callable[[int], None], worker: int) -> None:
    """What a loader process does first: signals to the whole job are the rank's affair, which ends it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sending: Any = multiprocessing.queues.Queue
    sending._on_queue_feeder_error = staticmethod(_lost_in_a_queue)
    prepare(worker)


def _lost_in_a_queue(error: Exception, item: Any) -> NoReturn:
    """What cannot be sent is waited for at the other end: better no loader than one that is silent."""
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def end_loaders() -> None:
    """End every loader process of this rank, now; they ignore what ends others."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


# Before Python's own end of such processes, which asks them by a signal that they ignore, and waits.
atexit.register(end_loaders)


def _converted(state: SavableDataLoaderState, *, has_process: bool) -> tuple[SavableDataLoaderState, int]:
    """A loader's state for a loader with a process, or without one; and how many packs are to be skipped after it.

    With a process Energon has a state of some packs ago, and their number; without one, that of this moment.
    """
    first = state.worker_states[0]
    if has_process and isinstance(first, FlexState):
        (inner,) = first["datasets"]
        now = SavableDatasetState(rng=None, dataset_state=inner, sample_index=first["_sample_index"])
        converted: Any = SavableDatasetCheckpoint(state=now, offset=0)
        return _with_worker_state(state, converted), 0
    if not has_process and isinstance(first, SavableDatasetCheckpoint):
        then = first.state
        if then is None:  # of the very beginning
            return _with_worker_state(state, None), first.offset
        converted = FlexState(
            datasets=[then.dataset_state],
            __class__="SimpleSavableDatasetWrapper",
            _sample_index=then.sample_index,
        )
        return _with_worker_state(state, converted), first.offset
    return state, 0


def _with_worker_state(state: SavableDataLoaderState, worker_state: Any) -> Any:
    """The state of a loader whose only worker has a state; None: it is at the beginning."""
    if worker_state is None:
        return None
    return SavableDataLoaderState(
        worker_states=[worker_state],
        next_worker_id=0,
        micro_batch_size=state.micro_batch_size,
    )
