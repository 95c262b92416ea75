"""DAT2: what the samples of the dataset are; `--check data` reads the first of every shard."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING

from dfmspec.check.rules.base import ALL, CP, DFM_DIT, DIT, ERROR, LENGTH, OURS, TP, WARNING, Rule, View, path
from dfmspec.check.rules.dataset import DATASET, WORKERS, folders_of
from dfmspec.data.energon_metadata import shard_counts
from dfmspec.data.packing import first_fit
from dfmspec.diagnostics import Finding

if TYPE_CHECKING:
    from dfmspec.data.shards import Sample, Scan


def _scan(view: View) -> Scan | None:
    from dfmspec.data.shards import scan

    folders = folders_of(view)
    return scan(*folders) if folders else None


def _about(faulty: list[Sample], read: int, what: str, hint: str, at: str = DATASET) -> Finding:
    """One finding for all samples with one fault: how many, and the first."""
    return Finding(path(at), f"{len(faulty)} of {read} samples that were read {what} (first: {faulty[0].place})", hint)


def _broken_shards(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if found and found.broken:
        yield Finding(path(DATASET), f"shards that cannot be read to their end: {len(found.broken)}, first {found.broken[0]}", "copy them again")


def _counted_differently(view: View) -> Iterator[Finding]:
    from dfmspec.data.shards import shown

    found, folders = _scan(view), folders_of(view)
    said = {folder / name: count for folder in folders for name, count in (shard_counts(folder) or {}).items()}
    if found and (odd := [shard for shard, count in sorted(found.counts.items()) if said.get(shard, count) != count]):
        first = f"{shown(odd[0], folders)} {found.counts[odd[0]]}, not {said[odd[0]]}"
        yield Finding(path(DATASET), f"{len(odd)} shards hold another number of samples than the metadata says (first: {first})", "prepare the dataset again")


def _memory(view: View) -> Iterator[Finding]:
    found = _scan(view)
    samples = sum(found.counts.values()) if found else 0
    if not samples or found is None or view["launcher.kind"] != "local":
        return
    each = sum(shard.stat().st_size for shard in found.counts) / samples
    nproc, workers, held = view["cluster.nproc_per_node"], max(1, view[WORKERS]), 100 + (view["dataset.packing_buffer_size"] or 0)
    need, here = nproc * workers * 2 * held * each, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > here:
        yield Finding(
            path(WORKERS), f"{nproc} ranks x {workers} workers x 2 (training, validation) x {held} samples held (shuffle, packing) of {each / 1e6:.2g} MB are {need / 1e9:.0f} GB, and this host has {here / 1e9:.0f}",
            "fewer dataset.num_workers",
        )  # fmt: skip


def _incomplete(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if found and (faulty := [s for s in found.samples if s.missing]):
        parts = ", ".join(sorted({f".{part}" for s in faulty for part in s.missing}))
        yield _about(faulty, len(found.samples), f"have no {parts} file", "prepare the dataset again; a sample is .pth, .pickle and .json under one name")


def _unreadable(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if found and (faulty := [s for s in found.samples if s.fault]):
        yield _about(faulty, len(found.samples), f"cannot be used: {faulty[0].fault}", "remove them, and ask where they come from if they want to run code")


def _latents(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return
    channels = view.trainer.LATENT_CHANNELS or view["model.in_channels"]
    patch = view["model.patch_spatial"]
    whole, read = [s for s in found.samples if s.latent], len(found.samples)
    if odd := [s for s in whole if s.latent and (len(s.latent.shape) != 4 or s.latent.shape[0] != channels)]:
        yield _about(odd, read, f"have latents of shape {list(odd[0].latent.shape) if odd[0].latent else ''}, not [{channels}, T, H, W]", f"encode with a tokenizer of {channels} channels")
        return
    if odd := [s for s in whole if s.size[1] % patch or s.size[2] % patch]:
        yield _about(odd, read, f"have latents of {odd[0].size[1]} x {odd[0].size[2]}, no whole number of {patch} x {patch} patches", "crop the pictures to multiples of 16 pixels")
    if odd := [s for s in whole if s.latent and not s.latent.finite]:
        yield _about(odd, read, "have values that are not finite", "encode them again")
    if odd := [s for s in whole if s.latent and s.latent.finite and s.latent.largest > 1000]:
        yield _about(odd, read, f"have values up to {odd[0].latent.largest:.0f} in size; DFM leaves out what is beyond 1000" if odd[0].latent else "", "encode them again")


def _texts(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if not found:
        return
    width, whole, read = view["model.crossattn_emb_size"], [s for s in found.samples if s.text], len(found.samples)
    if odd := [s for s in whole if s.text and (len(s.text.shape) != 2 or s.text.shape[1] != width)]:
        yield _about(odd, read, f"have text embeddings of shape {list(odd[0].text.shape) if odd[0].text else ''}, not [L, {width}]", "set model.crossattn_emb_size to their width, or encode the texts again")
        return
    lengths = {s.text.shape[0]: s for s in whole if s.text}
    if (most := view.trainer.TEXT_TOKENS) and (longest := max(lengths, default=0)) > most:
        yield Finding(path(DATASET), f"texts of up to {longest} tokens: DFM cuts them to 512 and keeps the mask of the longer text", "cut them to 512 when they are encoded")
    if view[CP] > 1 and (odd_lengths := sorted(n for n in lengths if n % view.trainer.TEXT_MULTIPLE)):
        yield Finding(path(CP), f"with CP {view[CP]} texts must have a multiple of 64 tokens, and some have {odd_lengths[0]}", "pad them to 512 when they are encoded")


def _tokens(sample: Sample, view: View) -> int:
    frames, height, width = sample.size
    patch = view["model.patch_spatial"]
    return int(frames // view["model.patch_temporal"] * (height // patch) * (width // patch))


def _too_long(view: View) -> Iterator[Finding]:
    found, length = _scan(view), view[LENGTH]
    whole = found.whole if found else ()
    tokens = sorted(_tokens(s, view) for s in whole)
    if tokens and tokens[-1] > length:
        over = sum(n > length for n in tokens)
        lost = "stop the run" if view.trainer.OWN else "are left out" + (", which is all of them: the loader searches for ever" if over == len(tokens) else "")
        yield Finding(
            path(LENGTH if view.is_users(LENGTH) else DATASET), f"{over} of {len(tokens)} samples that were read have more than the {length} tokens of a pack, and {lost}",
            f"{LENGTH} {math.ceil(tokens[-1] / 64) * 64} or more; half of the samples have at most {tokens[len(tokens) // 2]}",
        )  # fmt: skip


def _half_empty(view: View) -> Iterator[Finding]:
    found, length, buffer = _scan(view), view[LENGTH], view["dataset.packing_buffer_size"]
    tokens = [n for n in (_tokens(s, view) for s in found.whole) if n <= length] if found else []
    if tokens and (lost := _padding(tokens, buffer, length)) > _MOST_PADDING:
        better = next((size for size in (buffer * 2**i for i in range(1, 6)) if size <= _LARGEST_BUFFER and _padding(tokens, size, length) <= _MOST_PADDING), None)
        key = "dataset.packing_buffer_size"
        yield Finding(
            path(key if view.is_users(key) or not view.is_users(LENGTH) else LENGTH),
            f"packs of {length} tokens, chosen from {buffer} samples such as those that were read, are to {lost:.0%} padding",
            f"{key}={better}" if better else f"a {LENGTH} that samples fill: they have up to {max(tokens)} tokens",
        )  # fmt: skip


_MOST_PADDING = 0.15
_LARGEST_BUFFER = 2048
"""Samples that a hint may ask a loader process to hold."""


def _padding(tokens: list[int], buffer: int, length: int) -> float:
    """The share of padding in the trainer's packs of `buffer` samples like these."""
    sizes = list(islice(cycle(tokens), buffer))
    return 1 - sum(sizes) / (len(first_fit(sizes, length)) * length)


def _dropped(view: View) -> Iterator[Finding]:
    found = _scan(view)
    need = view[TP] if view[CP] == 1 else 2 * view[TP] * view[CP]
    whole = found.whole if found else ()
    faulty = [s for s in whole if math.prod(s.size) % need]
    if faulty:
        words = f"TP {view[TP]}" if view[CP] == 1 else f"2 x TP {view[TP]} x CP {view[CP]} = {need}"
        yield _about(faulty, len(whole), f"have T x H x W = {math.prod(faulty[0].size)}, no multiple of {words}, and are left out", "other sizes of pictures, or of TP and CP")


def _beyond_positions(view: View) -> Iterator[Finding]:
    found = _scan(view)
    whole = found.whole if found else ()
    for axis, (key, words) in enumerate((("model.max_frames", "frames"), ("model.max_img_h", "rows"), ("model.max_img_w", "columns"))):
        largest = max((s.size[axis] for s in whole), default=0)
        if largest > view[key]:
            yield Finding(path(key if view.is_users(key) else DATASET), f"samples have up to {largest} latent {words}, beyond {key} {view[key]}", f"{key} {largest} or more")


def _spread(view: View) -> Iterator[Finding]:
    found = _scan(view)
    latents = [s.latent for s in found.whole if s.latent and s.latent.finite] if found else []
    if not latents:
        return
    weights = [math.prod(t.shape) for t in latents]
    mean = sum(w * t.mean for w, t in zip(weights, latents, strict=True)) / sum(weights)
    std = math.sqrt(max(0.0, sum(w * t.mean_square for w, t in zip(weights, latents, strict=True)) / sum(weights) - mean * mean))
    if not 0.7 <= std <= 1.4:
        yield Finding(path(DATASET), f"latents have a standard deviation of {std:.2f}; training multiplies by sigma_data and expects about 1", "scale them to unit variance when they are encoded")


def _one_shape(view: View) -> Iterator[Finding]:
    found = _scan(view)
    shapes = Counter(s.size for s in found.whole) if found else Counter()
    if view["dataset.packing_buffer_size"] is None and len(shapes) > 1:
        yield Finding(path("dataset.packing_buffer_size"), f"samples have {len(shapes)} different sizes, and packing is off", "set dataset.packing_buffer_size, for example to 40")


_LOADER = "NVIDIA DFM data/dit/dit_taskencoder.py"

RULES = (
    Rule("DAT201", "shard-broken", ERROR, _broken_shards, "The loader fails, or goes round a broken shard in silence.", "webdataset", DIT, "data"),
    Rule("DAT202", "sample-incomplete", ERROR, _incomplete, "Upstream logs and leaves such samples out, and fails after 100 in a row; dfmspec's trainer stops.", _LOADER, DIT, "data"),
    Rule("DAT203", "sample-unreadable", ERROR, _unreadable, "A pickle can run any program on every node of the cluster; upstream unpickles whatever it is given.", "Python's pickle", DIT, "data"),
    Rule("DAT204", "latent-unfit", ERROR, _latents, "Upstream leaves such samples out with a line in the log, or fails in the first iteration.", _LOADER, DIT, "data"),
    Rule("DAT205", "text-unfit", ERROR, _texts, "Cross-attention fails in the first iteration, or reads beyond a text's end in silence.", _LOADER, DIT, "data"),
    Rule("DAT206", "sample-longer-than-pack", ERROR, _too_long, "Upstream leaves such samples out in silence, and waits for ever when all are; dfmspec's trainer stops.", _LOADER, DIT, "data"),
    Rule("DAT207", "sample-left-out", WARNING, _dropped, "Upstream leaves samples out whose unpatched size does not divide, with one warning for all.", _LOADER, DFM_DIT, "data"),
    Rule("DAT208", "sample-beyond-positions", ERROR, _beyond_positions, "Upstream takes the position of another place in silence; dfmspec's trainer stops.", "NVIDIA DFM model/common/dit_embeddings.py", DIT, "data"),
    Rule("DAT209", "latents-not-of-unit-variance", WARNING, _spread, "Noise levels would mean something else than in EDM's paper, and the loss would not start at 1.", "Karras et al. 2022, table 1", DIT, "data"),
    Rule("DAT210", "sizes-without-packing", ERROR, _one_shape, "The first two samples of different size cannot be stacked.", _LOADER, DFM_DIT, "data"),
    Rule("DAT211", "samples-counted-differently", ERROR, _counted_differently, "Energon deals samples out by these counts: some are never read, in silence, or a worker reads beyond the end.", "megatron-energon flavors/webdataset/sharder.py", ALL, "data"),
    Rule("DAT212", "loader-memory", WARNING, _memory, "The system ends a worker, or the run, when the buffers are full, which is minutes to hours after the start.", "NVIDIA DFM data/common/diffusion_energon_datamodule.py", DFM_DIT, "data"),
    Rule("DAT213", "packs-half-empty", WARNING, _half_empty, "Every iteration computes on padding, which costs as much as tokens.", "dfmspec/trainer/data/task_encoder.py, TaskEncoder", OURS, "data"),
)  # fmt: skip
