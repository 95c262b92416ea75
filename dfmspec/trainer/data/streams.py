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
from typing import Any, Protocol

import torch
from megatron.energon import SavableDataLoader, WorkerConfig, get_savable_loader, get_train_dataset

from dfmspec.errors import DataError
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.microbatch import DrawnSample, Pack
from dfmspec.trainer.data.patches import num_tokens
from dfmspec.trainer.data.task_encoder import PackedSample, TaskEncoder, packed, raise_data_error
from dfmspec.trainer.noise import counter_seed, draw

_ENERGON = threading.Lock()
"""Energon notes its active loader once for all threads, and an evaluation's loaders are read while another thread reads the training's."""
_SHUFFLE_SEQUENCE = 100  # samples read in a row from one place of a shard before jumping to another


class Packs(Protocol):
    """A resumable source of packed samples, for one stream."""

    def __next__(self) -> PackedSample: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class EnergonPacks:
    """One Energon loader; at most one worker process, which keeps the order that it has without."""

    def __init__(self, experiment: Experiment, split: str, stream: int) -> None:
        dataset, data = experiment.dataset, experiment.data
        worker_config = WorkerConfig(
            rank=stream,
            world_size=data.num_streams,
            num_workers=min(dataset.num_workers, 1) if split == "train" else 0,
            seed_offset=experiment.rng.seed,
            global_error_handler=raise_data_error,
        )
        part = "train" if dataset.use_train_split_for_val else split
        self._place = f"split {part} of {dataset.path}"
        self._loader: SavableDataLoader = get_savable_loader(
            get_train_dataset(
                dataset.path,
                split_part=part,
                worker_config=worker_config,
                batch_size=None,
                packing_buffer_size=dataset.packing_buffer_size,
                shuffle_buffer_size=dataset.shuffle_buffer_size if split == "train" else None,
                max_samples_per_sequence=_SHUFFLE_SEQUENCE if split == "train" else None,
                task_encoder=TaskEncoder(experiment),
            )
        )
        self._packs: Iterator[PackedSample] | None = None

    def __next__(self) -> PackedSample:
        try:
            with _ENERGON:
                if self._packs is None:
                    self._packs = iter(self._loader)
                return next(self._packs)
        except Exception as error:  # a sample's fault, or whatever a damaged shard leads Energon to
            # From a loader process comes its whole traceback as one text; the last line says what it was.
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            if isinstance(error, DataError):
                raise DataError(last.rpartition("SampleError: ")[2]) from error
            raise DataError(f"{self._place} cannot be read: {last}; dfmspec validate --check data names the damaged shard") from error

    def state(self) -> Any:
        with _ENERGON:
            return self._loader.save_state_rank()

    def restore(self, state: Any) -> None:
        with _ENERGON:
            self._loader.restore_state_rank(state)


class MockPacks:
    """Random latents of unit variance, made as they are asked for; DFM's --mock."""

    def __init__(self, experiment: Experiment, split: str, stream: int) -> None:
        self._experiment, self._split, self._stream, self._emitted = experiment, split, stream, 0

    def __next__(self) -> PackedSample:
        model, side = self._experiment.model, self._experiment.data.resolution // 8
        shape = (model.in_channels, model.patch_temporal, side, side)
        count = max(1, model.seq_length // num_tokens(shape, model.patch_temporal, model.patch_spatial))
        generator = torch.Generator().manual_seed(counter_seed("mock", self._split, self._stream, self._emitted))
        key = f"mock-{self._split}-{self._stream}-{self._emitted}"
        self._emitted += 1
        latents = [torch.randn(shape, generator=generator) for _ in range(count)]
        contexts = [torch.randn(16, model.crossattn_emb_size, generator=generator) for _ in range(count)]
        return packed([f"{key}-{i}" for i in range(count)], latents, contexts, key)

    def state(self) -> int:
        return self._emitted

    def restore(self, state: int) -> None:
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
        pack, diffusion = next(self._packs), self.experiment.diffusion
        samples = []
        for key, latent, context in pack.samples():
            drawn = draw(
                tuple(latent.shape), seed=self.experiment.rng.seed, split=self.split, stream=self.index, ordinal=self.ordinal,
                p_mean=diffusion.p_mean, p_std=diffusion.p_std,
                dropout=diffusion.condition_dropout if self.split == "train" else 0.0,
            )  # fmt: skip
            samples.append(DrawnSample(key, latent.float(), context, drawn))
            self.ordinal += 1
        return tuple(samples)

    def state(self) -> dict[str, Any]:
        """All that is needed to go on with the next sample."""
        return {"ordinal": self.ordinal, "packs": self._packs.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self.ordinal = state["ordinal"]
        self._packs.restore(state["packs"])


class RankStreams:
    """The packs of one data-parallel rank, in the order that the whole run has."""

    def __init__(self, experiment: Experiment, split: str, *, rank: int, size: int, consumed: int = 0) -> None:
        """`consumed`: packs that the run, over all ranks, has used before."""
        self._count = experiment.data.num_streams
        self.streams = {index: Stream(experiment, split, index) for index in range(rank, self._count, size)}
        self._next, self._size = consumed + rank, size

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        pack = next(self.streams[self._next % self._count])
        self._next += self._size
        return pack

    def states(self) -> dict[int, Any]:
        """The state of each stream: all that is needed to go on with its next sample."""
        return {index: stream.state() for index, stream in self.streams.items()}


def load_states(folder: Path, streams: Sequence[Stream]) -> None:
    """Restore streams from the files that `save_states` wrote."""
    for stream in streams:
        stream.restore(torch.load(_file(folder, stream.index), weights_only=False))


def save_states(folder: Path, states: dict[int, Any]) -> list[Path]:
    """Write one file a stream; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, state in states.items():
        torch.save(state, _file(folder, index))
    return [_file(folder, index) for index in states]


def _file(folder: Path, index: int) -> Path:
    return folder / f"stream_{index:05d}.pt"


