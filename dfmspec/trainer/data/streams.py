"""Sample streams: the order of the data belongs to them, never to ranks.

`data.num_streams` logical streams, each an Energon loader of its own with an explicit WorkerConfig(rank=stream,
world_size=num_streams). Pack i of the run, counted over all global batches, comes from stream i mod num_streams, and
the data-parallel rank r takes the packs i with i mod DP = r. Since DP divides num_streams, a rank owns its streams
whole; their state is saved by stream, so a run can go on with another DP and no sample is repeated or skipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Protocol

import torch

from dfmspec.data.encoders import EMBEDDED_PICTURES
from dfmspec.data.pickles import STREAM_NAMES, RestrictedUnpickler
from dfmspec.record.checkpoints import STREAMS, stream_file
from dfmspec.spec.experiment import Experiment
from dfmspec.trainer.data.loader import EnergonPacks
from dfmspec.trainer.data.microbatch import DrawnSample, Pack
from dfmspec.trainer.data.patches import num_tokens
from dfmspec.trainer.data.task_encoder import PackedSample, packed
from dfmspec.trainer.noise import Draw, counter_seed, draw

States = dict[int, Any]
"""The state of each stream of a rank, after an iteration's last pack."""


class Packs(Protocol):
    """A resumable source of packed samples, for one stream."""

    def __next__(self) -> PackedSample: ...

    def state(self) -> Any:
        """All that is needed to go on with the next pack."""

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken."""


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


def load_states(checkpoint: Path, streams: Sequence[Stream]) -> None:
    """Restore streams from the files that `save_states` wrote into a checkpoint.

    Raises:
        DataError: a file asks for what no state of a stream needs.
    """
    for stream in streams:
        state = torch.load(checkpoint / stream_file(stream.index), weights_only=False, pickle_module=_STATES)
        stream.restore(state)


def save_states(checkpoint: Path, states: States) -> list[Path]:
    """Write one file a stream into a checkpoint; returns the files."""
    (checkpoint / STREAMS).mkdir(exist_ok=True)
    files = []
    for index, state in states.items():
        file = checkpoint / stream_file(index)
        torch.save(state, file)
        files.append(file)
    return files
