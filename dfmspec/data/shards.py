"""A look into a WebDataset's shards, without torch: the first samples of each, as facts for rules."""

from __future__ import annotations

import math
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from dfmspec.data.energon_metadata import excluded, shards_there
from dfmspec.data.pickles import LARGEST
from dfmspec.data.samples import LATENT, TEXT, Part, missing, missing_fault
from dfmspec.data.tars import members, opened
from dfmspec.data.tensor_files import refuse_larger
from dfmspec.data.tensors import Tensor, read_tensor
from dfmspec.errors import DataError

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
    """[L, E]; without statistics."""

    @property
    def size(self) -> tuple[int, int, int]:
        """(T, H, W) of the latent."""
        assert self.latent is not None
        frames, height, width = self.latent.shape[-3:]
        return frames, height, width

    @property
    def problem(self) -> str:
        """What the trainer would stop at; empty: nothing that can be seen of the sample alone."""
        if self.missing:
            return missing_fault(self.missing)
        if self.fault or self.latent is None or self.text is None:
            return self.fault
        return self.latent.fault(LATENT) or self.text.fault(TEXT)

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
    apart: dict[str, tuple[str, ...]]
    """Shard -> the samples whose parts have others' files between them; Energon makes several incomplete ones of each.

    They are not among `samples`.
    """

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
    """The first samples of every shard, `limit` in all or one a shard; what cannot be read is told, never raised.

    What the metadata excludes is never trained on, and not looked at.
    """
    shards: list[tuple[Path, str, frozenset[str]]] = []
    for folder in folders:
        left_out = excluded(folder)
        shards += [(folder / name, name, left_out) for name in shards_there(folder) - left_out]

    found = Scan((), (), {}, {})
    samples: list[Sample] = []
    broken: list[str] = []
    for shard, in_folder, left_out in sorted(shards, key=itemgetter(0)):
        name = shard_name(shard, folders)
        try:
            shown = _read(shard, max(1, limit // len(shards)), in_folder, left_out)
        except (tarfile.TarError, OSError, EOFError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = lines[0]
            broken.append(f"{name}: {reason}")
            continue
        found.counts[shard] = shown.total
        if shown.apart:
            found.apart[name] = shown.apart
        samples += [_sample(f"{key} of {name}", files) for key, files in shown.first.items()]
    return replace(found, samples=tuple(samples), broken=tuple(broken))


_Files = dict[str, bytes | int]
"""Part -> what its file holds, of one sample; of one that is too large to be read, its size."""


class _Shard(NamedTuple):
    """What is found in a shard."""

    total: int
    """How many samples it has, as Energon counts."""
    first: dict[str, _Files]
    """The first samples that are not excluded, and whose parts are together."""
    apart: tuple[str, ...]


def _read(shard: Path, limit: int, name: str, left_out: frozenset[str]) -> _Shard:
    """The first samples of a shard; the rest is walked over, header by header: one that breaks off is found.

    Raises:
        TarError: it is damaged.
        OSError: it cannot be read.
    """
    total = 0
    first: dict[str, _Files] = {}
    pieces: dict[str, list[set[str]]] = {}
    with opened(shard) as tar:
        for member in members(tar):
            total += member.begins
            if left_out and f"{name}/{member.key}" in left_out:
                continue
            own = pieces.setdefault(member.key, [])
            if member.begins:
                own.append(set())
            own[-1].add(member.part)
            if member.key in first or len(first) < limit:
                first.setdefault(member.key, {})[member.part] = _content(tar, member.info)
        if shard.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")

    # A name that comes again with all parts is another sample.
    apart = tuple(key for key, own in pieces.items() if len(own) > 1 and any(map(missing, own)))
    for key in apart:
        first.pop(key, None)
    return _Shard(total, first, apart)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | int:
    """What a member holds, or its size where that is beyond what is read."""
    handle = tar.extractfile(info) if info.size <= LARGEST else None
    return info.size if handle is None else handle.read()


def _sample(place: str, files: _Files) -> Sample:
    """What is found of a sample, by its files."""
    lacking = missing(files)
    if lacking:
        return Sample(place, lacking)
    try:
        return Sample(place, latent=_tensor(files["pth"], LATENT), text=_tensor(files["pickle"], TEXT))
    except DataError as error:
        return Sample(place, fault=str(error))


def _tensor(content: bytes | int, part: Part) -> Tensor:
    """The tensor of a file, without a leading axis of 1.

    Raises:
        DataError: there is none that can be trained on.
    """
    if isinstance(content, int):
        refuse_larger(content, part.suffix)
        content = b""
    # Nobody asks for a text's mean.
    tensor = read_tensor(content, part.suffix, statistics=part is LATENT)
    if len(tensor.shape) == part.axes + 1 and tensor.shape[0] == 1:
        return replace(tensor, shape=tensor.shape[1:])
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
