"""DAT2: what the samples of the dataset are; `--check data` reads the first of every shard."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, NamedTuple

from dfmspec.check.rules.base import ALL, CP, DFM_DIT, DIT, ERROR, LENGTH, OURS, TP, WARNING, Rule, View, path
from dfmspec.check.rules.dataset import DATASET, WORKERS, folders_of
from dfmspec.data.energon_metadata import shard_counts
from dfmspec.data.packing import first_fit
from dfmspec.data.samples import MOST_TOKENS, SORTED, WHOLE, WHY_NOT_MORE
from dfmspec.diagnostics import Finding, Severity

if TYPE_CHECKING:
    from dfmspec.data.shards import Sample, Scan
    from dfmspec.data.tensors import Tensor

_PACKING = "dataset.packing_buffer_size"
_PATCH = "model.patch_spatial"
_TEXT_WIDTH = "model.crossattn_emb_size"

_SHUFFLED = 100
"""Samples that Energon's shuffle buffer holds."""
_LARGEST = 1000
"""The absolute value beyond which DFM leaves a latent out."""
_MOST_PADDING = 0.15
_LARGEST_BUFFER = 2048
"""Samples that a hint may ask a loader process to hold."""


def _scan(view: View) -> Scan | None:
    from dfmspec.data.shards import scan

    folders = folders_of(view)
    return scan(*folders) if folders else None


def _whole(found: Scan | None) -> tuple[Sample, ...]:
    """The samples that have a latent of four axes and a text of two."""
    return found.whole if found else ()


def _latent(sample: Sample) -> Tensor:
    assert sample.latent is not None
    return sample.latent


def _text(sample: Sample) -> Tensor:
    assert sample.text is not None
    return sample.text


def _about(faulty: Sequence[Sample], read: int, what: str, hint: str, severity: Severity | None = None) -> Finding:
    """One finding for all samples with one fault: how many, and the first."""
    count = len(faulty)
    first = faulty[0].place
    return Finding(path(DATASET), f"{count} of {read} samples that were read {what} (first: {first})", hint, severity)


def _broken_shards(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if found and found.broken:
        count = len(found.broken)
        message = f"shards that cannot be read to their end: {count}, first {found.broken[0]}"
        yield Finding(path(DATASET), message, "copy them again")


def _counted_differently(view: View) -> Iterator[Finding]:
    from dfmspec.data.shards import shard_name

    found = _scan(view)
    folders = folders_of(view)
    said: dict[FilePath, int] = {}
    for folder in folders:
        counts = shard_counts(folder) or {}
        said.update({folder / name: count for name, count in counts.items()})
    if not found:
        return
    # A shard of which the metadata says nothing is DAT1's.
    odd = [shard for shard, count in sorted(found.counts.items()) if said.get(shard, count) != count]
    if odd:
        shard = odd[0]
        name = shard_name(shard, folders)
        first = f"{name} {found.counts[shard]}, not {said[shard]}"
        count = len(odd)
        message = f"{count} shards hold another number of samples than the metadata says (first: {first})"
        yield Finding(path(DATASET), message, "prepare the dataset again")


def _memory(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return
    # Only a local run has this host's memory.
    samples = sum(found.counts.values())
    if not samples or view["launcher.kind"] != "local":
        return

    # What all loader processes hold.
    sample_bytes = sum(shard.stat().st_size for shard in found.counts) / samples
    nproc = view["cluster.nproc_per_node"]
    workers = max(1, view[WORKERS])
    held = _SHUFFLED + (view.or_null(_PACKING) or 0)
    need = nproc * workers * 2 * held * sample_bytes

    # What there is.
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > here:
        sample_mb = sample_bytes / 1e6
        need_gb = need / 1e9
        here_gb = here / 1e9
        message = (
            f"{nproc} ranks x {workers} workers x 2 (training, validation) x {held} samples held (shuffle, packing) "
            f"of {sample_mb:.2g} MB are {need_gb:.0f} GB, and this host has {here_gb:.0f}"
        )
        yield Finding(path(WORKERS), message, "fewer dataset.num_workers")


def _incomplete(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return

    # What Energon would take apart.
    if found.apart:
        shard, keys = next(iter(found.apart.items()))
        count = sum(map(len, found.apart.values()))
        message = (
            f"the parts of {count} samples are not next to one another in their shard (first: {keys[0]} of {shard}): "
            "a sample ends where the next name begins, and each of these is read as several that are incomplete"
        )
        yield Finding(path(DATASET), message, SORTED)

    # What is not there at all.
    faulty = [sample for sample in found.samples if sample.missing]
    if faulty:
        missing = set(chain.from_iterable(sample.missing for sample in faulty))
        parts = ", ".join(sorted(f".{part}" for part in missing))
        hint = f"prepare the dataset again; {WHOLE}"
        yield _about(faulty, len(found.samples), f"have no {parts} file", hint)


def _unreadable(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return
    faulty = [sample for sample in found.samples if sample.fault]
    if faulty:
        hint = "encode them again, or remove them; ask where they come from if they want to run code"
        yield _about(faulty, len(found.samples), f"cannot be used: {faulty[0].fault}", hint)


def _latents(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return
    channels = view.trainer.LATENT_CHANNELS or view["model.in_channels"]
    samples = [sample for sample in found.samples if sample.latent]
    read = len(found.samples)

    # Axes; with others than these, nothing else can be said.
    odd = [sample for sample in samples if not _is_latent(_latent(sample), channels)]
    if odd:
        shape = list(_latent(odd[0]).shape)
        what = f"have latents of shape {shape}, not [{channels}, T, H, W]"
        yield _about(odd, read, what, f"encode with a tokenizer of {channels} channels")
        return

    # Sizes, in whole patches.
    patch = (view["model.patch_temporal"], view[_PATCH], view[_PATCH])
    odd = [sample for sample in samples if not _has_whole_patches(sample, patch)]
    if odd:
        size = " x ".join(map(str, odd[0].size))
        patches = " x ".join(map(str, patch))
        what = f"have latents of {size}, no whole number of {patches} patches"
        yield _about(odd, read, what, "crop the pictures to multiples of 16 pixels")

    # Values.
    odd = [sample for sample in samples if not _latent(sample).finite]
    if odd:
        yield _about(odd, read, "have latents whose values are not finite (NaN or inf, as fp32)", "encode them again")
    odd = [sample for sample in samples if _latent(sample).finite and _latent(sample).largest > _LARGEST]
    if odd:
        largest = _latent(odd[0]).largest
        what = f"have latents with values up to {largest:.0f} in size; DFM leaves out what is beyond {_LARGEST}"
        severity = WARNING if view.trainer.OWN else None
        yield _about(odd, read, what, "encode them again", severity=severity)


def _is_latent(tensor: Tensor, channels: int) -> bool:
    """Whether it is [channels, T, H, W]."""
    return len(tensor.shape) == 4 and tensor.shape[0] == channels


def _has_whole_patches(sample: Sample, patch: tuple[int, int, int]) -> bool:
    return not any(map(operator.mod, sample.size, patch))


def _texts(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return
    width = view[_TEXT_WIDTH]
    samples = [sample for sample in found.samples if sample.text]

    # Axes; with others than these, nothing else can be said.
    odd = [sample for sample in samples if not _is_text(_text(sample), width)]
    if odd:
        shape = list(_text(odd[0]).shape)
        what = f"have text embeddings of shape {shape}, not [L, {width}]"
        hint = f"set {_TEXT_WIDTH} to their width, or encode the texts again"
        yield _about(odd, len(found.samples), what, hint)
        return

    # Values.
    odd = [sample for sample in samples if not _text(sample).finite]
    if odd:
        what = "have text embeddings whose values are not finite (NaN or inf, as fp32)"
        yield _about(odd, len(found.samples), what, "encode the texts again")

    # Lengths that the task encoder cuts, or that nobody means.
    lengths = {_text(sample).shape[0] for sample in samples}
    longest = max(lengths, default=0)
    most = view.trainer.TEXT_TOKENS
    if most and longest > most:
        message = f"texts of up to {longest} tokens: DFM cuts them to 512 and keeps the mask of the longer text"
        yield Finding(path(DATASET), message, "cut them to 512 when they are encoded")
    elif longest > MOST_TOKENS:
        message = f"texts of up to {longest} tokens; {WHY_NOT_MORE}"
        yield Finding(path(DATASET), message, f"cut them to {MOST_TOKENS} when they are encoded", WARNING)

    # Lengths that context-parallel ranks cannot share.
    if view[CP] > 1:
        uneven = sorted(length for length in lengths if length % view.trainer.TEXT_MULTIPLE)
        if uneven:
            message = f"with CP {view[CP]} texts must have a multiple of 64 tokens, and some have {uneven[0]}"
            yield Finding(path(CP), message, "pad them to 512 when they are encoded")


def _is_text(tensor: Tensor, width: int) -> bool:
    """Whether it is [L, width]."""
    return len(tensor.shape) == 2 and tensor.shape[1] == width


def _tokens(sample: Sample, view: View) -> int:
    """The patches of a sample's latent."""
    frames, height, width = sample.size
    patch = view[_PATCH]
    rows = height // patch
    columns = width // patch
    return int(frames // view["model.patch_temporal"] * (rows * columns))


def _too_long(view: View) -> Iterator[Finding]:
    found = _scan(view)
    length = view[LENGTH]
    tokens = sorted(_tokens(sample, view) for sample in _whole(found))
    if not tokens or tokens[-1] <= length:
        return
    read = len(tokens)
    over = sum(number > length for number in tokens)

    # What becomes of them.
    if view.trainer.OWN:
        then = "stop the run"
    elif over == read:
        then = "are left out, which is all of them: the loader searches for ever"
    else:
        then = "are left out"

    needed = math.ceil(tokens[-1] / 64) * 64
    median = tokens[read // 2]
    yield Finding(
        path(LENGTH if view.is_set_by_user(LENGTH) else DATASET),
        f"{over} of {read} samples that were read have more than the {length} tokens of a pack, and {then}",
        f"{LENGTH} {needed} or more; half of the samples have at most {median}",
    )


def _half_empty(view: View) -> Iterator[Finding]:
    found = _scan(view)
    length = view[LENGTH]
    buffer = view[_PACKING]
    tokens = [_tokens(sample, view) for sample in _whole(found)]
    # Longer samples are DAT206's.
    tokens = [number for number in tokens if number <= length]
    if not tokens:
        return
    lost = _padding(tokens, buffer, length)
    if lost <= _MOST_PADDING:
        return

    # More to choose from, or packs that samples fill.
    larger = _buffer_that_fills(tokens, buffer, length)
    if larger:
        hint = f"{_PACKING}={larger}"
    else:
        longest = max(tokens)
        hint = f"a {LENGTH} that samples fill: they have up to {longest} tokens"
    at = _PACKING
    if view.is_set_by_user(LENGTH) and not view.is_set_by_user(_PACKING):
        at = LENGTH
    message = (
        f"packs of {length} tokens, chosen from {buffer} samples such as those that were read, "
        f"are to {lost:.0%} padding"
    )
    yield Finding(path(at), message, hint)


def _buffer_that_fills(tokens: Sequence[int], buffer: int, length: int) -> int | None:
    """The least doubling of the buffer with which packs are full enough, up to 32 times."""
    for doublings in range(1, 6):
        size: int = buffer * 2**doublings
        if size <= _LARGEST_BUFFER and _padding(tokens, size, length) <= _MOST_PADDING:
            return size
    return None


def _padding(tokens: Sequence[int], buffer: int, length: int) -> float:
    """The share of padding in the trainer's packs of `buffer` samples like these."""
    sizes = list(islice(cycle(tokens), buffer))
    packs = len(first_fit(sizes, length))
    return 1 - sum(sizes) / (packs * length)


def _dropped(view: View) -> Iterator[Finding]:
    found = _scan(view)
    cp = view[CP]
    tp = view[TP]
    # DFM's task encoder asks this of the latent before it is cut into patches.
    if cp == 1:
        need = tp
        words = f"TP {tp}"
    else:
        need = 2 * tp * cp
        words = f"2 x TP {tp} x CP {cp} = {need}"
    samples = _whole(found)
    faulty = [sample for sample in samples if math.prod(sample.size) % need]
    if faulty:
        size = math.prod(faulty[0].size)
        what = f"have T x H x W = {size}, no multiple of {words}, and are left out"
        yield _about(faulty, len(samples), what, "other sizes of pictures, or of TP and CP")


class _Positions(NamedTuple):
    """How many positions there are along an axis of the latents."""

    axis: int
    key: str
    words: str


_POSITIONS = (
    _Positions(0, "model.max_frames", "frames"),
    _Positions(1, "model.max_img_h", "rows"),
    _Positions(2, "model.max_img_w", "columns"),
)


def _beyond_positions(view: View) -> Iterator[Finding]:
    samples = _whole(_scan(view))
    for axis, key, words in _POSITIONS:
        largest = max((sample.size[axis] for sample in samples), default=0)
        if largest > view[key]:
            at = key if view.is_set_by_user(key) else DATASET
            message = f"samples have up to {largest} latent {words}, beyond {key} {view[key]}"
            yield Finding(path(at), message, f"{key} {largest} or more")


def _spread(view: View) -> Iterator[Finding]:
    samples = _whole(_scan(view))
    latents = [_latent(sample) for sample in samples if _latent(sample).finite]
    if not latents:
        return
    # Over all values of all samples, of which each has as many as its shape says.
    weights = [math.prod(latent.shape) for latent in latents]
    mean = _weighted([latent.mean for latent in latents], weights)
    mean_square = _weighted([latent.mean_square for latent in latents], weights)
    std = math.sqrt(max(0.0, mean_square - mean * mean))
    if not 0.7 <= std <= 1.4:
        message = (
            f"latents have a standard deviation of {std:.2f}; training multiplies by sigma_data and expects about 1"
        )
        yield Finding(path(DATASET), message, "scale them to unit variance when they are encoded")


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    """The mean of values that count by weights."""
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _one_shape(view: View) -> Iterator[Finding]:
    shapes = {sample.size for sample in _whole(_scan(view))}
    if view.or_null(_PACKING) is None and len(shapes) > 1:
        count = len(shapes)
        message = f"samples have {count} different sizes, and packing is off"
        yield Finding(path(_PACKING), message, f"set {_PACKING}, for example to 40")


_LOADER = "NVIDIA DFM data/dit/dit_taskencoder.py"

RULES = (
    # What cannot be read.
    Rule(
        "DAT201",
        "shard-broken",
        ERROR,
        _broken_shards,
        "The loader fails, or goes round a broken shard in silence.",
        "webdataset",
        targets=DIT,
        level="data",
    ),
    Rule(
        "DAT202",
        "sample-incomplete",
        ERROR,
        _incomplete,
        "Upstream logs and leaves such samples out, and fails after 100 in a row; dfmspec's trainer stops.",
        _LOADER,
        targets=DIT,
        level="data",
    ),
    Rule(
        "DAT203",
        "sample-unreadable",
        ERROR,
        _unreadable,
        "A pickle can run any program on every node of the cluster; upstream unpickles whatever it is given.",
        "Python's pickle",
        targets=DIT,
        level="data",
    ),
    # What does not fit the network.
    Rule(
        "DAT204",
        "latent-unfit",
        ERROR,
        _latents,
        "Upstream leaves such samples out with a line in the log, or fails in the first iteration.",
        _LOADER,
        targets=DIT,
        level="data",
    ),
    Rule(
        "DAT205",
        "text-unfit",
        ERROR,
        _texts,
        "Cross-attention fails in the first iteration, or reads beyond a text's end in silence.",
        _LOADER,
        targets=DIT,
        level="data",
    ),
    # What does not fit a pack, or the ranks.
    Rule(
        "DAT206",
        "sample-longer-than-pack",
        ERROR,
        _too_long,
        "Upstream leaves such samples out in silence, and waits for ever when all are; dfmspec's trainer stops.",
        _LOADER,
        targets=DIT,
        level="data",
    ),
    Rule(
        "DAT207",
        "sample-left-out",
        WARNING,
        _dropped,
        "Upstream leaves samples out whose unpatched size does not divide, with one warning for all.",
        _LOADER,
        targets=DFM_DIT,
        level="data",
    ),
    # What the network takes for something else.
    Rule(
        "DAT208",
        "sample-beyond-positions",
        ERROR,
        _beyond_positions,
        "Upstream takes the position of another place in silence; dfmspec's trainer stops.",
        "NVIDIA DFM model/common/dit_embeddings.py",
        targets=DIT,
        level="data",
    ),
    Rule(
        "DAT209",
        "latents-not-of-unit-variance",
        WARNING,
        _spread,
        "Noise levels would mean something else than in EDM's paper, and the loss would not start at 1.",
        "Karras et al. 2022, table 1",
        targets=DIT,
        level="data",
    ),
    # What needs packing.
    Rule(
        "DAT210",
        "sizes-without-packing",
        ERROR,
        _one_shape,
        "The first two samples of different size cannot be stacked.",
        _LOADER,
        targets=DFM_DIT,
        level="data",
    ),
    # What the metadata, and this host, do not allow for.
    Rule(
        "DAT211",
        "samples-counted-differently",
        ERROR,
        _counted_differently,
        "Energon deals samples out by these counts: some are never read, in silence, or a worker reads beyond the end.",
        "megatron-energon flavors/webdataset/sharder.py",
        targets=ALL,
        level="data",
    ),
    Rule(
        "DAT212",
        "loader-memory",
        WARNING,
        _memory,
        "The system ends a worker, or the run, when the buffers are full, which is minutes to hours after the start.",
        "NVIDIA DFM data/common/diffusion_energon_datamodule.py",
        targets=DFM_DIT,
        level="data",
    ),
    # What costs time alone.
    Rule(
        "DAT213",
        "packs-half-empty",
        WARNING,
        _half_empty,
        "Every iteration computes on padding, which costs as much as tokens.",
        "dfmspec/trainer/data/task_encoder.py, TaskEncoder",
        targets=OURS,
        level="data",
    ),
)
