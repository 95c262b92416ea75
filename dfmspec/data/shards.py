"""A look into a WebDataset's shards, without torch: the first samples of each, as facts for rules."""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from dfmspec.bounded import open_regular
from dfmspec.data.tensors import LARGEST, Tensor, read_tensor
from dfmspec.errors import DataError

SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""Energon's own way to split a member's name into the sample's and the part's."""
PARTS = ("pth", "pickle", "json")
_Files = dict[str, bytes]
"""Part -> what its file holds, of one sample."""
SAMPLES = 64
"""How many samples are read of a dataset; one at least of every shard."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was found of one sample."""

    place: str
    """`key of shard`."""
    missing: tuple[str, ...] = ()
    fault: str = ""
    latent: Tensor | None = None
    """[C, T, H, W]."""
    text: Tensor | None = None
    """[L, E]."""

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) of the latent."""
        assert self.latent is not None
        frames, height, width = self.latent.shape[-3:]
        return frames, height, width

    @property
    def is_whole(self) -> bool:
        """Whether it has a latent of four axes and a text of two."""
        if self.latent is None or self.text is None:
            return False
        return len(self.latent.shape) == 4 and len(self.text.shape) == 2


@dataclass(frozen=True, slots=True)
class Scan:
    """The samples that were read, and the shards that could not be."""

    samples: tuple[Sample, ...]
    broken: tuple[str, ...]
    counts: dict[Path, int]
    """Shard -> how many samples it has, as Energon counts."""

    @property
    def whole(self) -> tuple[Sample, ...]:
        """Samples with a latent of four axes and a text of two."""
        return tuple(sample for sample in self.samples if sample.is_whole)


def shard_name(shard: Path, folders: Sequence[Path]) -> str:
    """A shard's name for a reader: its path in the one folder, or the whole one where there are several."""
    if len(folders) == 1:
        return str(shard.relative_to(folders[0]))
    return str(shard)


@lru_cache(maxsize=8)
def scan(*folders: Path, limit: int = SAMPLES) -> Scan:
    """The first samples of every shard, `limit` in all or one a shard; what cannot be read is told, never raised."""
    shards: list[Path] = []
    for folder in folders:
        shards += folder.rglob("*.tar")
    samples: list[Sample] = []
    broken: list[str] = []
    counts: dict[Path, int] = {}
    for shard in sorted(shards):
        name = shard_name(shard, folders)
        of_a_shard = max(1, limit // len(shards))
        try:
            members, counts[shard] = _members(shard, of_a_shard)
        except (tarfile.TarError, OSError, EOFError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = lines[0]
            broken.append(f"{name}: {reason}")
            continue
        for key, parts in members.items():
            place = f"{key} of {name}"
            samples.append(_sample(place, parts))
    return Scan(tuple(samples), tuple(broken), counts)


def _members(shard: Path, limit: int) -> tuple[dict[str, _Files], int]:
    """The parts of the first samples, and how many samples there are; a part for which there is no room is empty."""
    samples: dict[str, _Files] = {}
    count = 0
    last = None
    room = LARGEST
    with open_regular(shard) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            match = SAMPLE_NAME.match(member.name) if member.isfile() else None
            if match is None:
                continue
            key, part = match.groups()

            # A sample's parts stand one after the other; Energon counts a sample wherever the key changes.
            if key != last:
                count += 1
                last = key

            # The rest is walked over, header by header: a shard that breaks off is found.
            if key not in samples and len(samples) == limit:
                continue
            content = b""
            handle = tar.extractfile(member) if member.size <= room else None
            if handle is not None:
                content = handle.read()
            room -= len(content)
            samples.setdefault(key, {})[part] = content
        if shard.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")
    return samples, count


def _sample(place: str, parts: _Files) -> Sample:
    """What is found of a sample, by its files."""
    missing = tuple(part for part in PARTS if part not in parts)
    if missing:
        return Sample(place, missing)
    try:
        latent = read_tensor(parts["pth"], ".pth")
        text = read_tensor(parts["pickle"], ".pickle")
    except DataError as error:
        return Sample(place, fault=str(error))
    return Sample(
        place,
        latent=_unbatched(latent, 4),
        text=_unbatched(text, 2),
    )


def _unbatched(tensor: Tensor, axes: int) -> Tensor:
    """Without a leading axis of 1."""
    shape = tensor.shape
    if len(shape) == axes + 1 and shape[0] == 1:
        return replace(tensor, shape=shape[1:])
    return tensor


def spread(latents: Sequence[Tensor]) -> tuple[float, float]:
    """Mean and standard deviation of all values of some latents; there is at least one."""
    weights = [math.prod(latent.shape) for latent in latents]
    total = sum(weights)
    weighted = list(zip(weights, latents, strict=True))
    mean = sum(weight * latent.mean for weight, latent in weighted) / total
    square = sum(weight * latent.mean_square for weight, latent in weighted) / total
    variance = max(0.0, square - mean * mean)
    return mean, math.sqrt(variance)


UNIT_VARIANCE = (0.7, 1.4)
"""The standard deviations that are near enough to 1, which training expects: it multiplies by sigma_data."""
