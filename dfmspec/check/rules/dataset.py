"""DAT1: what the spec says of the dataset, and what the dataset's metadata says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path as FilePath

from dfmspec.check.rules.base import ALL, DFM, DIT, ERROR, HINT, OURS, WARNING, Rule, View, excludes, path
from dfmspec.data.energon_metadata import faults, prepared, shard_counts, split_counts, split_shards
from dfmspec.data.metadataset import Gap, Leaf, everything, is_metadataset, leaves, names_itself, read
from dfmspec.diagnostics import Finding
from dfmspec.spec.paths import local_path
from dfmspec.targets.layout import nearest_multiples

DATASET, WORKERS, STREAMS = "dataset.path", "dataset.num_workers", "data.num_streams"


def is_placeholder(value: str) -> bool:
    """Whether a path is one of those that examples have."""
    return bool(re.search(r"(^|/)path/to(/|$)|DATASET_FOLDER|<[^>]+>|/your/", value))


def _dataset_given(view: View) -> Iterator[Finding]:
    hint = "; or data.source=embedded to try without one" if view.trainer.OWN else ""
    if view[DATASET] == "" and not view.is_mock:
        yield Finding(path(DATASET), f"{DATASET} is empty, which means the working directory", f"give --dataset-path or dataset.path{hint}", ERROR)
    elif view[DATASET] is None and view["data.source"] == "webdataset":
        yield Finding(path(DATASET), "no dataset is named", f"give --dataset-path or dataset.path{hint}")


def _named(view: View) -> str | None:
    name: str | None = view[DATASET]
    return None if not name or view["data.source"] != "webdataset" or "://" in name or is_placeholder(name) else name


def _dataset(view: View) -> FilePath | None:
    name = _named(view)
    return local_path(name) if name else None


def _needed(view: View) -> list[str]:
    """The splits that are read."""
    evaluated = not view["dataset.use_train_split_for_val"] and (view["train.eval_iters"] or not view.trainer.OWN)
    return ["train", "val"] if evaluated else ["train"]


def _read(view: View) -> list[Leaf | Gap]:
    """What is read of the dataset, each once."""
    dataset = _dataset(view)
    return list(dict.fromkeys(leaf for split in _needed(view) for leaf in leaves(dataset, split, energon=view.trainer.ENERGON))) if dataset else []


def folders_of(view: View) -> list[FilePath]:
    """The folders of shards that are read, as far as they are there, but for those with metadata of another name."""
    dataset = _dataset(view)
    if dataset and not is_metadataset(dataset):  # whatever is read of it
        return [dataset] if dataset.is_dir() else []
    return [folder for folder in dict.fromkeys(leaf.folder for leaf in _read(view) if isinstance(leaf, Leaf) and not leaf.configured) if folder.is_dir()]


def _dataset_missing(view: View) -> Iterator[Finding]:
    name = _named(view)
    if name is None:
        return
    dataset, energon = local_path(name), view.trainer.ENERGON
    if dataset.is_file() and not is_metadataset(dataset):
        if view.trainer.OWN or dataset.suffix != ".yml":  # which Energon 6 takes
            yield Finding(path(DATASET), f"dataset {name} is a file", "name the folder that holds the shards, or a metadataset's .yaml")
    elif not dataset.exists():
        yield Finding(path(DATASET), f"dataset {name} does not exist", "check the path; dfmspec data prepare makes one")
    for part in everything(dataset, energon=energon):
        if is_metadataset(part):
            yield from (Finding(path(DATASET), f"metadataset {part}: {fault}", _FORM) for fault in read(part, energon=energon)[1])
            if names_itself(part, energon=energon):
                yield Finding(path(DATASET), f"metadataset {part} names itself, directly or by way of others", "name folders of shards in the innermost ones")
        elif part != dataset and part.suffix != ".jsonl" and not os.path.isdir(part):  # noqa: PTH112  which a name too long does not stop
            yield Finding(
                path(DATASET), f"metadataset {name} names {part}, which {'is no dataset' if os.path.exists(part) else 'does not exist'}",  # noqa: PTH110
                "check the path, which is relative to the file that names it",
            )  # fmt: skip


_FORM = "its form is: __module__: megatron.energon, __class__: MetadatasetV2, splits: {train: {path: FOLDER}, val: {blend: [{weight: 1, path: FOLDER}]}}"


def _metadata_missing(view: View) -> Iterator[Finding]:
    dataset, looked_into = _dataset(view), folders_of(view)
    for folder in looked_into:
        yield from _unprepared(folder, view)
    for other in everything(dataset, energon=view.trainer.ENERGON) if dataset else ():  # splits that nobody reads are opened all the same
        if other not in looked_into and os.path.isdir(other) and not prepared(other):  # noqa: PTH112
            yield Finding(path(DATASET), f"dataset {other} has no Energon metadata (.nv-meta/.info.json)", f"run: energon prepare {other}")


def _unprepared(folder: FilePath, view: View) -> Iterator[Finding]:
    metadata = folder / ".nv-meta"
    command = f"run: energon prepare --sample-type CrudeWebdataset {folder}"
    if not (metadata / "dataset.yaml").exists():
        yield Finding(path(DATASET), f"dataset {folder} has no Energon metadata (.nv-meta/dataset.yaml)", command)
        return
    if "CrudeWebdataset" not in (metadata / "dataset.yaml").read_text(errors="replace"):
        yield Finding(path(DATASET), f"{metadata / 'dataset.yaml'} does not declare a CrudeWebdataset, whose samples are cooked by the task encoder", command)
    if view.trainer.ENERGON == 6 and not (metadata / ".info.yaml").exists():
        yield Finding(path(DATASET), f"{metadata} has no .info.yaml: it was not prepared by Energon 6, which DFM pins", "prepare it again with megatron-energon 6.0.1")
    for fault in faults(folder):
        yield Finding(path(DATASET), fault, command)


def _splits(view: View) -> Iterator[Finding]:
    ours = view.trainer.OWN
    for leaf in _read(view):
        if isinstance(leaf, Gap):
            if leaf.there:  # else DAT102 says it
                has = ", ".join(leaf.there)
                yield Finding(path(DATASET), f"metadataset {leaf.file} has no split {leaf.split}; it has {has}", _without(leaf.split, "add it", ours=ours))
            continue
        folder, split, configured = leaf
        counts = None if configured or not folder.is_dir() else split_counts(folder)
        if counts is None:
            continue
        if not counts.get(split):
            yield Finding(
                path(DATASET), f"the {split} split of {folder} is empty (Energon splits by shard: {_described(counts)})",
                _without(split, "prepare it again with more shards or another --split-ratio", ours=ours),
            )  # fmt: skip
        elif ours and counts[split] < view[STREAMS]:
            yield Finding(
                path(STREAMS if view.is_users(STREAMS) else DATASET),
                f"{view[STREAMS]} streams share the {counts[split]} samples of split {split} of {folder}; each needs at least one",
                f"data.num_streams at most {counts[split]}, or fewer dataset.num_workers",
            )  # fmt: skip
        elif not ours and counts[split] < (loaders := view.data_parallel_size * max(1, view[WORKERS])):
            yield Finding(
                path(WORKERS if view.is_users(WORKERS) else DATASET),
                f"DP {view.data_parallel_size} x {max(1, view[WORKERS])} workers = {loaders} loaders share the {counts[split]} samples of split {split} of {folder}; each needs at least one",
                f"dataset.num_workers at most {counts[split] // view.data_parallel_size}",
            )  # fmt: skip


def _without(split: str, mended: str, *, ours: bool) -> str:
    """What to do about a split that is not there."""
    return mended if split != "val" else "set dataset.use_train_split_for_val=true" + (", or train.eval_iters=0" if ours else "")


def _described(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _shards_differ(view: View) -> Iterator[Finding]:
    for folder in folders_of(view):
        if (splits := split_shards(folder)) is not None and (counts := shard_counts(folder)) is not None:
            yield from _differing(folder, splits, counts)


def _differing(folder: FilePath, splits: dict[str, list[str]], counts: dict[str, int]) -> Iterator[Finding]:
    named, there = {name for split in splits.values() for name in split}, {str(file.relative_to(folder)) for file in folder.rglob("*.tar")}
    if missing := sorted(named - there):
        yield Finding(path(DATASET), f"of the shards that the metadata of {folder} names, {len(missing)} are missing, first {missing[0]}", "copy them, or prepare the dataset again")
    if uncounted := sorted(named - counts.keys()):
        yield Finding(path(DATASET), f"the splits of {folder} name {len(uncounted)} shards whose samples its metadata does not count, first {uncounted[0]}", "prepare the dataset again")
    if unnamed := sorted(there - counts.keys()):
        yield Finding(path(DATASET), f"{folder} has {len(unnamed)} shards that its metadata does not name, first {unnamed[0]}: they are never read", "prepare the dataset again", WARNING)


def _index(view: View) -> Iterator[Finding]:
    for folder in folders_of(view):
        counts = sorted((shard_counts(folder) or {}).items())
        stale = [name for name, count in counts if (folder / name).is_file() and _length((folder / name).with_suffix(".tar.idx")) != count + 1]
        if not stale:
            continue
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


RULES = (
    Rule("RUN102", "placeholder-path", WARNING, _placeholders, "A copied example would write to, or read from, a path that nobody meant: upstream creates it in silence.", "DFM's own example files"),
    Rule("DAT101", "dataset-not-named", HINT, _dataset_given, "There is nothing to train on; upstream looks into a folder of its container.", "NVIDIA DFM pretrain_dit_model.py", DIT),
    Rule("DAT102", "dataset-missing", ERROR, _dataset_missing, "The loader would fail after the model is built, on every rank.", "megatron-energon", ALL, "paths"),
    Rule("DAT103", "dataset-metadata-missing", ERROR, _metadata_missing, "Energon cannot open a folder of shards that was not prepared, or not by its own version.", "megatron-energon flavors/webdataset", ALL, "paths"),
    Rule("DAT104", "split-empty", ERROR, _splits, "The loader of an empty split fails, or waits for ever; so does a worker without a sample.", "megatron-energon", ALL, "paths"),
    Rule("DAT105", "shards-differ", ERROR, _shards_differ, "The loader fails when it gets there, which may be hours into the run; samples of a shard that is not named are never seen, in silence.", "megatron-energon", ALL, "paths"),
    Rule("DAT106", "streams-not-divisible", ERROR, _streams, "A sample stream belongs to one data-parallel rank; that is what lets DP change between attempts.", "dfmspec/trainer/data/streams.py", OURS),
    Rule(
        "DAT107", "loader-kind-fixed", ERROR,
        excludes(lambda v: v["dataset.dataloader_type"] != "external", at="dataset.dataloader_type",
                 message=lambda v: f"dataset.dataloader_type {v['dataset.dataloader_type']}: Energon's loader is external to Megatron", hint="remove it"),
        "Accepted at start; the loader cannot be built, after the model was.", "NVIDIA DFM data/common/diffusion_energon_datamodule.py", DFM,
    ),
    Rule("DAT108", "index-stale", ERROR, _index, "Energon finds samples by the index beside each shard: without, the loader fails; with an old one, it reads in the middle of samples.", "megatron-energon flavors/webdataset/itar.py", ALL, "paths"),
)  # fmt: skip
