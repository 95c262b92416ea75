"""A look into a WebDataset's shards, without torch: the first samples of each, as facts for rules."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dfmspec.data.tensors import LARGEST, Tensor, read_tensor
from dfmspec.errors import DataError

SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""Energon's own way to split a member's name into the sample's and the part's."""
PARTS = ("pth", "pickle", "json")
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
        return tuple(s for s in self.samples if s.latent and s.text and len(s.latent.shape) == 4 and len(s.text.shape) == 2)


def shown(shard: Path, folders: Sequence[Path]) -> str:
    """A shard's name for a reader: its path in the one folder, or the whole one where there are several."""
    return str(shard.relative_to(folders[0]) if len(folders) == 1 else shard)


@lru_cache(maxsize=8)
def scan(*folders: Path, limit: int = SAMPLES) -> Scan:
    """Read the first samples of every shard; never raises for what is in them."""
    shards = sorted(shard for folder in folders for shard in folder.rglob("*.tar"))
    samples: list[Sample] = []
    broken: list[str] = []
    counts: dict[Path, int] = {}
    for shard in shards:
        try:
            members, counts[shard] = _members(shard, max(1, limit // len(shards)))
            samples += [_sample(f"{key} of {shown(shard, folders)}", parts) for key, parts in members.items()]
        except (tarfile.TarError, OSError, EOFError) as error:
            broken.append(f"{shown(shard, folders)}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return Scan(tuple(samples), tuple(broken), counts)


def _members(shard: Path, limit: int) -> tuple[dict[str, dict[str, bytes]], int]:
    """The parts of the first samples, and how many samples there are."""
    samples: dict[str, dict[str, bytes]] = {}
    count, last = 0, None
    with tarfile.open(shard) as tar:
        for member in tar:
            match = SAMPLE_NAME.match(member.name) if member.isfile() else None
            count, last = (count + 1, match[1]) if match is not None and match[1] != last else (count, last)
            if match is None or (match[1] not in samples and len(samples) == limit):
                continue  # the rest is walked over, header by header: a shard that breaks off is found
            handle = tar.extractfile(member) if member.size <= LARGEST else None
            samples.setdefault(match[1], {})[match[2]] = handle.read() if handle else b""
        if shard.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")
    return samples, count


def _sample(place: str, parts: dict[str, bytes]) -> Sample:
    missing = tuple(part for part in PARTS if part not in parts)
    if missing:
        return Sample(place, missing)
    try:
        latent, text = read_tensor(parts["pth"], ".pth"), read_tensor(parts["pickle"], ".pickle")
    except DataError as error:
        return Sample(place, fault=str(error))
    return Sample(place, latent=_unbatched(latent, 4), text=_unbatched(text, 2))


def _unbatched(tensor: Tensor, axes: int) -> Tensor:
    """Without a leading axis of 1."""
    if len(tensor.shape) == axes + 1 and tensor.shape[0] == 1:
        return Tensor(tensor.shape[1:], tensor.format, tensor.finite, tensor.largest, tensor.mean, tensor.mean_square)
    return tensor
