"""Sample streams: the order of the data belongs to them, never to ranks.

`data.num_streams` logical streams, each an Energon loader of its own with an explicit WorkerConfig(rank=stream,
world_size=num_streams). Pack i of the run, counted over all global batches, comes from stream i mod num_streams, and
the data-parallel rank r takes the packs i with i mod DP = r. Since DP divides num_streams, a rank owns its streams
whole; their state is saved by stream, so a run can go on with another DP and no sample is repeated or skipped.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Protocol

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader, get_train_dataset

from dfmspec.data.encoders import EMBEDDED_PICTURES
from dfmspec.data.pickles import STREAM_NAMES, RestrictedUnpickler
from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.microbatch import DrawnSample, Pack
from dfmspec.trainer.data.patches import num_tokens
from dfmspec.trainer.data.task_encoder import PackedSample, TaskEncoder, packed, raise_data_error
from dfmspec.trainer.noise import Draw, counter_seed, draw

_ENERGON = threading.Lock()
"""Energon notes its active loader once for all threads, and an evaluation's loaders are read while another thread reads
the training's."""
_SHUFFLE_SEQUENCE = 100
"""Samples read in a row from one place of a shard before jumping to another."""

States = dict[int, Any]
"""The state of each stream of a rank, after an iteration's last pack."""


class Packs(Protocol):
    """A resumable source of packed samples, for one stream."""

    def __next__(self) -> PackedSample: ...

    def state(self) -> Any:
        """All that is needed to go on with the next pack."""

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken."""


class EnergonPacks:
    """One Energon loader; at most one worker process, which keeps the order that it has without.

    Raises a DataError for a pack that cannot be read.
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
        self._packs: Iterator[PackedSample] | None = None

    def __next__(self) -> PackedSample:
        try:
            with _ENERGON:
                if self._packs is None:
                    self._packs = iter(self._loader)
                return next(self._packs)
        except Exception as error:  # a sample's fault, or whatever a damaged shard leads Energon to
            raise self._data_error(error) from error

    def _data_error(self, error: Exception) -> DataError:
        """What is said of an error while a pack is read."""
        # From a loader process comes its whole traceback as one text; the last line says what it was.
        text = str(error).strip() or type(error).__name__
        last = text.splitlines()[-1]
        if isinstance(error, DataError):
            return DataError(last.rpartition("SampleError: ")[2])
        return DataError(f"{self._place} cannot be read: {last}; dfmspec validate --check data names the damaged shard")

    def state(self) -> Any:
        """Energon's state of the loader."""
        with _ENERGON:
            return self._loader.save_state_rank()

    def restore(self, state: Any) -> None:
        """Go on where Energon's `state` was taken."""
        with _ENERGON:
            self._loader.restore_state_rank(state)


class MockPacks:
    """Random latents of unit variance, made as they are asked for; DFM's --mock."""

    def __init__(self, experiment: Experiment, split: str, stream: int) -> None:
        self._experiment = experiment
        self._split = split
        self._stream = stream
        self._emitted = 0

    def __next__(self) -> PackedSample:
        # As many latents of one size as fill a pack.
        model = self._experiment.model
        side = self._experiment.data.resolution // EMBEDDED_PICTURES.compression
        shape = (model.in_channels, model.patch_temporal, side, side)
        tokens = num_tokens(shape, model.patch_temporal, model.patch_spatial)
        count = max(1, model.seq_length // tokens)

        # Drawn by a generator of this pack's own.
        seed = counter_seed("mock", self._split, self._stream, self._emitted)
        generator = torch.Generator().manual_seed(seed)
        latents = [torch.randn(shape, generator=generator) for _ in range(count)]
        text_shape = (16, model.crossattn_emb_size)
        contexts = [torch.randn(text_shape, generator=generator) for _ in range(count)]

        key = f"mock-{self._split}-{self._stream}-{self._emitted}"
        keys = [f"{key}-{i}" for i in range(count)]
        self._emitted += 1
        return packed(keys, latents, contexts, key)

    def state(self) -> int:
        """How many packs were emitted."""
        return self._emitted

    def restore(self, state: int) -> None:
        """Go on after as many packs as `state` says."""
        self._emitted = state


@dataclasses.dataclass
class Stream:
    """One stream: its packs, each sample stamped with its ordinal and given its noise."""

    experiment: Experiment
    split: str
    index: int
    ordinal: int = 0
    """Samples emitted so far: the counter of the noise."""

    def __post_init__(self) -> None:
        kind = MockPacks if self.experiment.data.source == "mock" else EnergonPacks
        self._packs: Packs = kind(self.experiment, self.split, self.index)

    def __next__(self) -> Pack:
        pack = next(self._packs)
        samples = []
        for key, latent, context in pack.samples():
            noise = self._draw(tuple(latent.shape))
            samples.append(DrawnSample(key, latent.float(), context, noise))
            self.ordinal += 1
        return tuple(samples)

    def _draw(self, shape: tuple[int, ...]) -> Draw:
        """What training adds to the sample that comes next, whose latent has this shape."""
        diffusion = self.experiment.diffusion
        dropout = diffusion.condition_dropout if self.split == "train" else 0.0
        return draw(
            shape,
            seed=self.experiment.rng.seed,
            split=self.split,
            stream=self.index,
            ordinal=self.ordinal,
            p_mean=diffusion.p_mean,
            p_std=diffusion.p_std,
            dropout=dropout,
        )

    def state(self) -> dict[str, Any]:
        """All that is needed to go on with the next sample."""
        return {"ordinal": self.ordinal, "packs": self._packs.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.ordinal = state["ordinal"]
        self._packs.restore(state["packs"])


class RankStreams:
    """The packs of one data-parallel rank, without end, in the order that the whole run has."""

    def __init__(
        self,
        experiment: Experiment,
        split: str,
        *,
        rank: int,
        size: int,
        consumed: int = 0,
    ) -> None:
        """Open the streams of data-parallel rank `rank` of `size`.

        `consumed`: packs that the run, over all ranks, has used before.
        """
        self._count = experiment.data.num_streams
        own = range(rank, self._count, size)
        self.streams = {index: Stream(experiment, split, index) for index in own}
        self._next = consumed + rank
        self._size = size

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        stream = self.streams[self._next % self._count]
        pack = next(stream)
        self._next += self._size
        return pack

    def states(self) -> States:
        """The state of each stream of this rank: all that is needed to go on with its next sample."""
        return {index: stream.state() for index, stream in self.streams.items()}


class _StateUnpickler(RestrictedUnpickler):
    """Reads the state of a stream, and nothing else."""

    def __init__(self, stream: IO[bytes], **_: Any) -> None:
        super().__init__(stream, STREAM_NAMES, holds="the state of a stream")


_STATES = SimpleNamespace(__name__="pickle", Unpickler=_StateUnpickler)
"""What torch.load takes for Python's pickle: its own reader is a class derived from this one."""


def load_states(folder: Path, streams: Sequence[Stream]) -> None:
    """Restore streams from the files that `save_states` wrote.

    Raises:
        DataError: a file asks for what no state of a stream needs.
    """
    for stream in streams:
        state = torch.load(_file(folder, stream.index), weights_only=False, pickle_module=_STATES)
        stream.restore(state)


def save_states(folder: Path, states: States) -> list[Path]:
    """Write one file a stream into a folder, which is made; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, state in states.items():
        file = _file(folder, index)
        torch.save(state, file)
        files.append(file)
    return files


def _file(folder: Path, index: int) -> Path:
    return folder / f"stream_{index:05d}.pt"
