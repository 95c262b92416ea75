"""DAT: what the spec says of the dataset, what the dataset's metadata says, and what its samples are."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from dfmspec.diagnostics import Finding
from dfmspec.energon_metadata import faults, shard_counts, split_counts, split_shards
from dfmspec.layout import nearest_multiples
from dfmspec.load import local_path
from dfmspec.packing import first_fit
from dfmspec.rules.base import ALL, CP, DFM, DFM_DIT, DIT, ERROR, HINT, LENGTH, OURS, TP, WARNING, Rule, View, excludes, path

if TYPE_CHECKING:
    from dfmspec.shards import Sample, Scan

DATASET, WORKERS, STREAMS = "dataset.path", "dataset.num_workers", "data.num_streams"


def is_placeholder(value: str) -> bool:
    """Whether a path is one of those that examples have."""
    return bool(re.search(r"(^|/)path/to(/|$)|DATASET_FOLDER|<[^>]+>|/your/", value))


def _dataset_given(view: View) -> Iterator[Finding]:
    hint = "; or data.source=embedded to try without one" if view.target == "megatron_core" else ""
    if view[DATASET] == "" and not view.is_mock:
        yield Finding(path(DATASET), f"{DATASET} is empty, which means the working directory", f"give --dataset-path or dataset.path{hint}", ERROR)
    elif view[DATASET] is None and view["data.source"] == "webdataset":
        yield Finding(path(DATASET), "no dataset is named", f"give --dataset-path or dataset.path{hint}")


def _named(view: View) -> str | None:
    name: str | None = view[DATASET]
    return None if not name or view["data.source"] != "webdataset" or "://" in name or is_placeholder(name) else name


def _dataset(view: View) -> FilePath | None:
    """The dataset's folder when it is there."""
    name = _named(view)
    folder = local_path(name) if name else None
    return folder if folder and folder.is_dir() else None


def _dataset_missing(view: View) -> Iterator[Finding]:
    name = _named(view)
    if name is None:
        return
    folder = local_path(name)
    if folder.is_file():
        if folder.suffix not in (".yaml", ".yml"):  # a metadataset
            yield Finding(path(DATASET), f"dataset {name} is a file", "name the folder that holds the shards")
    elif not folder.is_dir():
        yield Finding(path(DATASET), f"dataset {name} does not exist", "check the path; dfmspec data prepare makes one")


def _metadata_missing(view: View) -> Iterator[Finding]:
    folder = _dataset(view)
    if folder is None:
        return
    metadata = folder / ".nv-meta"
    command = f"run: energon prepare --sample-type CrudeWebdataset {folder}"
    if not (metadata / "dataset.yaml").exists():
        yield Finding(path(DATASET), f"dataset {folder} has no Energon metadata (.nv-meta/dataset.yaml)", command)
        return
    if "CrudeWebdataset" not in (metadata / "dataset.yaml").read_text(errors="replace"):
        yield Finding(path(DATASET), f"{metadata / 'dataset.yaml'} does not declare a CrudeWebdataset, whose samples are cooked by the task encoder", command)
    if view.target != "megatron_core" and not (metadata / ".info.yaml").exists():
        yield Finding(path(DATASET), f"{metadata} has no .info.yaml: it was not prepared by Energon 6, which DFM pins", "prepare it again with megatron-energon 6.0.1")
    for fault in faults(folder):
        yield Finding(path(DATASET), fault, command)


def _splits(view: View) -> Iterator[Finding]:
    folder = _dataset(view)
    counts = split_counts(folder) if folder else None
    if counts is None:
        return
    ours = view.target == "megatron_core"
    needed = ["train"]
    if not view["dataset.use_train_split_for_val"] and (view["train.eval_iters"] or not ours):
        needed.append("val")
    for split in needed:
        if not counts.get(split):
            hint = "set dataset.use_train_split_for_val=true" + (", or train.eval_iters=0" if ours else "")
            yield Finding(
                path(DATASET), f"the {split} split of {folder} is empty (Energon splits by shard: {_described(counts)})",
                hint if split == "val" else "prepare it again with more shards or another --split-ratio",
            )  # fmt: skip
        elif ours and counts[split] < view[STREAMS]:
            yield Finding(
                path(STREAMS if view.is_users(STREAMS) else DATASET),
                f"{view[STREAMS]} streams share the {counts[split]} samples of split {split}; each needs at least one",
                f"data.num_streams at most {counts[split]}, or fewer dataset.num_workers",
            )  # fmt: skip
        elif not ours and counts[split] < (loaders := view.data_parallel_size * max(1, view[WORKERS])):
            yield Finding(
                path(WORKERS if view.is_users(WORKERS) else DATASET),
                f"DP {view.data_parallel_size} x {max(1, view[WORKERS])} workers = {loaders} loaders share the {counts[split]} samples of split {split}; each needs at least one",
                f"dataset.num_workers at most {counts[split] // view.data_parallel_size}",
            )  # fmt: skip


def _described(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _shards_differ(view: View) -> Iterator[Finding]:
    folder = _dataset(view)
    if folder is None or (splits := split_shards(folder)) is None or (counts := shard_counts(folder)) is None:
        return
    named, there = {name for split in splits.values() for name in split}, {str(file.relative_to(folder)) for file in folder.rglob("*.tar")}
    if missing := sorted(named - there):
        yield Finding(path(DATASET), f"of the shards that the metadata of {folder} names, {len(missing)} are missing, first {missing[0]}", "copy them, or prepare the dataset again")
    if uncounted := sorted(named - counts.keys()):
        yield Finding(path(DATASET), f"the splits of {folder} name {len(uncounted)} shards whose samples its metadata does not count, first {uncounted[0]}", "prepare the dataset again")
    if unnamed := sorted(there - counts.keys()):
        yield Finding(path(DATASET), f"{folder} has {len(unnamed)} shards that its metadata does not name, first {unnamed[0]}: they are never read", "prepare the dataset again", WARNING)


def _index(view: View) -> Iterator[Finding]:
    folder = _dataset(view)
    counts = shard_counts(folder) if folder else None
    stale = [name for name, count in sorted((counts or {}).items()) if folder and (folder / name).is_file() and _length((folder / name).with_suffix(".tar.idx")) != count + 1]
    if stale:
        yield Finding(path(DATASET), f"{len(stale)} shards of {folder} have no .tar.idx of as many samples as the metadata counts, first {stale[0]}", f"run: energon prepare {folder}")


def _length(index: FilePath) -> int | None:
    """The offsets in Energon's index of a shard: one a sample, and the end."""
    return index.stat().st_size // 8 if index.is_file() else None


def _placeholders(view: View) -> Iterator[Finding]:
    for key in (DATASET, "checkpoint.save", "checkpoint.load"):
        value = view[key]
        if view.is_users(key) and isinstance(value, str) and is_placeholder(value):
            upstreams_own = value.rpartition("/")[2] == "DATASET_FOLDER"  # a file that waits for its first edit
            yield Finding(path(key), f"{key} {value} looks like a placeholder", "put the real path", HINT if upstreams_own else None)


def _streams(view: View) -> Iterator[Finding]:
    streams, dp = view[STREAMS], view.data_parallel_size
    if streams % dp:
        yield Finding(
            path(STREAMS), f"data.num_streams {streams} is not a multiple of the data-parallel size {dp}",
            f"{' or '.join(map(str, nearest_multiples(streams, dp)))}; a rank owns whole streams",
        )  # fmt: skip


# Samples: --check data reads the first of every shard.


def _scan(view: View) -> Scan | None:
    from dfmspec.shards import scan

    folder = _dataset(view)
    return scan(folder) if folder else None


def _about(faulty: list[Sample], read: int, what: str, hint: str, at: str = DATASET) -> Finding:
    """One finding for all samples with one fault: how many, and the first."""
    return Finding(path(at), f"{len(faulty)} of {read} samples that were read {what} (first: {faulty[0].place})", hint)


def _broken_shards(view: View) -> Iterator[Finding]:
    found = _scan(view)
    if found and found.broken:
        yield Finding(path(DATASET), f"shards that cannot be read to their end: {len(found.broken)}, first {found.broken[0]}", "copy them again")


def _counted_differently(view: View) -> Iterator[Finding]:
    found, folder = _scan(view), _dataset(view)
    counts = (shard_counts(folder) if folder else None) or {}
    if found and (odd := [name for name, count in sorted(found.counts.items()) if name in counts and counts[name] != count]):
        yield Finding(path(DATASET), f"{len(odd)} shards hold another number of samples than the metadata says (first: {odd[0]} {found.counts[odd[0]]}, not {counts[odd[0]]})", "prepare the dataset again")


def _memory(view: View) -> Iterator[Finding]:
    found, folder = _scan(view), _dataset(view)
    samples = sum(found.counts.values()) if found else 0
    if not samples or folder is None or found is None or view["launcher.kind"] != "local":
        return
    each = sum((folder / name).stat().st_size for name in found.counts) / samples
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
    channels = view["model.in_channels"] if view.target == "megatron_core" else 16
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
    if view.target == "dfm" and (longest := max(lengths, default=0)) > 512:
        yield Finding(path(DATASET), f"texts of up to {longest} tokens: DFM cuts them to 512 and keeps the mask of the longer text", "cut them to 512 when they are encoded")
    if view[CP] > 1 and (odd_lengths := sorted(n for n in lengths if n % 64)):
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
        lost = "stop the run" if view.target == "megatron_core" else "are left out" + (", which is all of them: the loader searches for ever" if over == len(tokens) else "")
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
    Rule("RUN102", "placeholder-path", WARNING, _placeholders, "A copied example would write to, or read from, a path that nobody meant: upstream creates it in silence.", "DFM's own example files"),
    Rule("DAT101", "dataset-not-named", HINT, _dataset_given, "There is nothing to train on; upstream looks into a folder of its container.", "NVIDIA DFM pretrain_dit_model.py", DIT),
    Rule("DAT102", "dataset-missing", ERROR, _dataset_missing, "The loader would fail after the model is built, on every rank.", "megatron-energon", ALL, "paths"),
    Rule("DAT103", "dataset-metadata-missing", ERROR, _metadata_missing, "Energon cannot open a folder of shards that was not prepared, or not by its own version.", "megatron-energon flavors/webdataset", ALL, "paths"),
    Rule("DAT104", "split-empty", ERROR, _splits, "The loader of an empty split fails, or waits for ever; so does a worker without a sample.", "megatron-energon", ALL, "paths"),
    Rule("DAT105", "shards-differ", ERROR, _shards_differ, "The loader fails when it gets there, which may be hours into the run; samples of a shard that is not named are never seen, in silence.", "megatron-energon", ALL, "paths"),
    Rule("DAT106", "streams-not-divisible", ERROR, _streams, "A sample stream belongs to one data-parallel rank; that is what lets DP change between attempts.", "dfmspec/trainer/streams.py", OURS),
    Rule(
        "DAT107", "loader-kind-fixed", ERROR,
        excludes(lambda v: v["dataset.dataloader_type"] != "external", at="dataset.dataloader_type",
                 message=lambda v: f"dataset.dataloader_type {v['dataset.dataloader_type']}: Energon's loader is external to Megatron", hint="remove it"),
        "Accepted at start; the loader cannot be built, after the model was.", "NVIDIA DFM data/common/diffusion_energon_datamodule.py", DFM,
    ),
    Rule("DAT108", "index-stale", ERROR, _index, "Energon finds samples by the index beside each shard: without, the loader fails; with an old one, it reads in the middle of samples.", "megatron-energon flavors/webdataset/itar.py", ALL, "paths"),
    Rule("DAT201", "shard-broken", ERROR, _broken_shards, "The loader fails, or goes round a broken shard in silence.", "webdataset", DIT, "data"),
    Rule("DAT202", "sample-incomplete", ERROR, _incomplete, "Upstream logs and leaves such samples out, and fails after 100 in a row; dfmspec's trainer stops.", _LOADER, DIT, "data"),
    Rule("DAT203", "sample-unreadable", ERROR, _unreadable, "A pickle can run any program on every node of the cluster; upstream unpickles whatever it is given.", "Python's pickle", DIT, "data"),
    Rule("DAT204", "latent-unfit", ERROR, _latents, "Upstream leaves such samples out with a line in the log, or fails in the first iteration.", _LOADER, DIT, "data"),
    Rule("DAT205", "text-unfit", ERROR, _texts, "Cross-attention fails in the first iteration, or reads beyond a text's end in silence.", _LOADER, DIT, "data"),
    Rule("DAT206", "sample-longer-than-pack", ERROR, _too_long, "Upstream leaves such samples out in silence, and waits for ever when all are; dfmspec's trainer stops.", _LOADER, DIT, "data"),
    Rule("DAT207", "sample-left-out", WARNING, _dropped, "Upstream leaves samples out whose unpatched size does not divide, with one warning for all.", _LOADER, DFM_DIT, "data"),
    Rule("DAT208", "sample-beyond-positions", ERROR, _beyond_positions, "Upstream takes the position of another place in silence; dfmspec's trainer stops.", "NVIDIA DFM model/common/dit_embeddings.py", DIT, "data"),
    Rule("DAT209", "latents-not-of-unit-variance", WARNING, _spread, "Noise levels would mean something else than in EDM's paper, and the loss would not start at 1.", "Karras et al. 2022, table 1", DIT, "data"),
    Rule("DAT211", "samples-counted-differently", ERROR, _counted_differently, "Energon deals samples out by these counts: some are never read, in silence, or a worker reads beyond the end.", "megatron-energon flavors/webdataset/sharder.py", ALL, "data"),
    Rule("DAT212", "loader-memory", WARNING, _memory, "The system ends a worker, or the run, when the buffers are full, which is minutes to hours after the start.", "NVIDIA DFM data/common/diffusion_energon_datamodule.py", DFM_DIT, "data"),
    Rule("DAT213", "packs-half-empty", WARNING, _half_empty, "Every iteration computes on padding, which costs as much as tokens.", "dfmspec/trainer/samples.py, TaskEncoder", OURS, "data"),
    Rule("DAT210", "sizes-without-packing", ERROR, _one_shape, "The first two samples of different size cannot be stacked.", _LOADER, DFM_DIT, "data"),
)  # fmt: skip,
