"""DAT1: what the spec says of the dataset, and what the dataset's metadata says."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path as FilePath

from dfmspec.bounded import METADATA_BYTES, read_text
from dfmspec.check.rules.base import DFM, DIT, ERROR, HINT, OURS, WARNING, Rule, View, excludes, listed, path
from dfmspec.data.energon_metadata import (
    excluded,
    faults,
    prepared,
    shard_counts,
    shards_there,
    split_counts,
    split_shards,
    streams_without_sample,
)
from dfmspec.data.metadataset import MOST, Gap, Leaf, addresses, everything, is_metadataset, leaves, names_itself, read
from dfmspec.data.upgrade import disagrees, lacking
from dfmspec.diagnostics import Finding
from dfmspec.spec.paths import PATH_KEYS, REMOTE, local_path, scheme
from dfmspec.targets.layout import nearest_multiples

DATASET = "dataset.path"
WORKERS = "dataset.num_workers"
STREAMS = "data.num_streams"
_SOURCE = "data.source"
_LOADER = "dataset.dataloader_type"


def is_placeholder(value: str) -> bool:
    """Whether a path is one of those that examples have."""
    return bool(re.search(r"(^|/)path/to(/|$)|DATASET_FOLDER|<[^>]+>|/your/|\{\{|^(TODO|FIXME|CHANGEME)$", value))


def _dataset_given(view: View) -> Iterator[Finding]:
    hint = "give --dataset-path or dataset.path"
    if view.trainer.OWN:
        hint += "; or data.source=embedded to try without one"
    if view.or_null(DATASET) == "" and not view.is_mock:
        yield Finding(path(DATASET), f"{DATASET} is empty, which means the working directory", hint, ERROR)
    elif view.or_null(DATASET) is None and view[_SOURCE] == "webdataset":
        yield Finding(path(DATASET), "no dataset is named", hint)


def _addresses(view: View) -> Iterator[Finding]:
    # The dataset, which Energon reads.
    named = view.or_null(DATASET)
    if named and not view.is_mock:
        found = scheme(named)
        is_drawn = view[_SOURCE] == "embedded"
        if found == REMOTE and is_drawn:
            yield Finding(
                path(DATASET),
                f"{DATASET} {named}: data.source embedded draws into a folder of this machine",
                "give a path, or data.source=webdataset to read what is there",
            )
        elif found not in (None, REMOTE):
            yield _address_not_read(f"{DATASET} {named}", named)

    # Folders that dfmspec itself reads and writes.
    for key in view.set_by_user(*sorted(PATH_KEYS - {DATASET})):
        value = view.or_null(key)
        found = scheme(value) if isinstance(value, str) else None
        if found:
            yield Finding(
                path(key),
                f"{key} {value}: {found}:// is not a folder of this machine, which it has to be",
                _path_instead(value),
            )


def _address_not_read(named: str, address: str) -> Finding:
    found = scheme(address)
    message = f"{named}: {found}:// is not read; the forms that are: a path, or {REMOTE}://PROFILE/PATH"
    return Finding(path(DATASET), message, _path_instead(address, f", or give it a profile of {REMOTE}://"))


def _path_instead(address: str, otherwise: str = "") -> str:
    """What to do about an address that is not read."""
    if scheme(address) == "file":
        _, _, place = address.partition("://")
        return f"give the path: {place}"
    return f"download or mount it and give the path{otherwise}"


def _named(view: View) -> str | None:
    """The dataset's name, where it is read and can be looked at from here."""
    name: str | None = view.or_null(DATASET)
    if not name or view[_SOURCE] != "webdataset" or scheme(name) or is_placeholder(name):
        return None
    return name


def _dataset(view: View) -> FilePath | None:
    name = _named(view)
    return local_path(name) if name else None


def _needed(view: View) -> list[str]:
    """The splits that are read."""
    if view["dataset.use_train_split_for_val"]:
        return ["train"]
    # Upstream opens the validation split with evaluation off, too.
    opened = view["train.eval_iters"] or not view.trainer.OWN
    return ["train", "val"] if opened else ["train"]


def _read(view: View) -> list[Leaf | Gap]:
    """What is read of the dataset, each once."""
    dataset = _dataset(view)
    if dataset is None:
        return []
    found: dict[Leaf | Gap, None] = {}
    for split in _needed(view):
        found |= dict.fromkeys(leaves(dataset, split, energon=view.trainer.ENERGON))
    return list(found)


def folders_of(view: View) -> list[FilePath]:
    """The folders of shards that are read, as far as they are there, but for those with metadata of another name."""
    dataset = _dataset(view)
    if dataset is None:
        return []

    # A plain folder is looked into whatever is read of it.
    if not is_metadataset(dataset):
        return [dataset] if dataset.is_dir() else []

    folders: list[FilePath] = []
    for leaf in _read(view):
        if isinstance(leaf, Gap) or leaf.configured:
            continue
        if leaf.folder not in folders and leaf.folder.is_dir():
            folders.append(leaf.folder)
    return folders


_FORM = (
    "its form is: __module__: megatron.energon, __class__: MetadatasetV2, "
    "splits: {train: {path: FOLDER}, val: {blend: [{weight: 1, path: FOLDER}]}}"
)


def _dataset_missing(view: View) -> Iterator[Finding]:
    name = _named(view)
    if name is None:
        return
    dataset = local_path(name)

    # The dataset itself. A metadataset's name may end in .yml for Energon 6.
    if dataset.is_file() and not is_metadataset(dataset):
        if view.trainer.OWN or dataset.suffix != ".yml":
            yield Finding(
                path(DATASET),
                f"dataset {name} is a file",
                "name the folder that holds the shards, or a metadataset's .yaml",
            )
    elif not dataset.exists():
        yield Finding(
            path(DATASET),
            f"dataset {name} does not exist",
            "check the path; dfmspec data prepare makes one",
        )

    # What it names, where it is a metadataset.
    parts = everything(dataset, energon=view.trainer.ENERGON)
    if len(parts) >= MOST:
        yield Finding(
            path(DATASET),
            f"metadataset {name} names more datasets than are looked at, which are {MOST}",
            "blend fewer, larger ones",
        )
    for part in parts:
        if is_metadataset(part):
            yield from _metadataset_faults(part, view)
        elif part != dataset and part.suffix != ".jsonl" and not _is_folder(part):
            exists = os.path.exists(part)  # noqa: PTH110  which a name too long does not stop
            what = "is no dataset" if exists else "does not exist"
            yield Finding(
                path(DATASET),
                f"metadataset {name} names {part}, which {what}",
                "check the path, which is relative to the file that names it",
            )


def _is_folder(place: FilePath) -> bool:
    return os.path.isdir(place)  # noqa: PTH112  which a name too long does not stop


def _metadataset_faults(file: FilePath, view: View) -> Iterator[Finding]:
    energon = view.trainer.ENERGON
    _, said = read(file, energon=energon)
    for fault in said:
        yield Finding(path(DATASET), f"metadataset {file}: {fault}", _FORM)
    if names_itself(file, energon=energon):
        yield Finding(
            path(DATASET),
            f"metadataset {file} names itself, directly or by way of others",
            "name folders of shards in the innermost ones",
        )
    for address in addresses(file, energon=energon):
        if view.trainer.OWN and scheme(address) not in (None, REMOTE):
            yield _address_not_read(f"metadataset {file} names {address}", address)


def _metadata_missing(view: View) -> Iterator[Finding]:
    dataset = _dataset(view)
    looked_into = folders_of(view)
    for folder in looked_into:
        yield from _unprepared(folder, view)
    if dataset is None:
        return
    # Splits that nobody reads are opened all the same.
    for other in everything(dataset, energon=view.trainer.ENERGON):
        if other not in looked_into and _is_folder(other) and not prepared(other):
            yield Finding(
                path(DATASET),
                f"dataset {other} has no Energon metadata (.nv-meta/.info.json)",
                f"run: energon prepare {other}",
            )


def _unprepared(folder: FilePath, view: View) -> Iterator[Finding]:
    metadata = folder / ".nv-meta"
    kind = metadata / "dataset.yaml"
    command = f"run: energon prepare --sample-type CrudeWebdataset {folder}"

    # What a sample is.
    if not kind.exists():
        yield Finding(
            path(DATASET),
            f"dataset {folder} has no Energon metadata (.nv-meta/dataset.yaml)",
            command,
        )
        return
    if "CrudeWebdataset" not in read_text(kind, most=METADATA_BYTES, errors="replace"):
        yield Finding(
            path(DATASET),
            f"{kind} does not declare a CrudeWebdataset, whose samples are cooked by the task encoder",
            command,
        )

    # Whether the Energon that reads it finds its counts and splits.
    lacks = lacking(folder, view.trainer.ENERGON)
    if lacks and prepared(folder):
        yield Finding(
            path(DATASET),
            f"{metadata} has no {lacks[0]}: it was not prepared by Energon 6, which DFM pins",
            f"run: dfmspec data upgrade {folder}",
        )
    if view.trainer.ENERGON == 6 and disagrees(folder):
        yield Finding(
            path(DATASET),
            f"{metadata} counts other samples in .info.json, which Energon 7 reads, than in .info.yaml, which 6 reads",
            f"remove the one that is stale, and run: dfmspec data upgrade {folder}",
        )
    for fault in faults(folder):
        yield Finding(path(DATASET), fault, command)


def _splits(view: View) -> Iterator[Finding]:
    for leaf in _read(view):
        if isinstance(leaf, Gap):
            yield from _split_missing(view, leaf)
            continue
        counts = None
        if not leaf.configured and leaf.folder.is_dir():
            counts = split_counts(leaf.folder)
        if counts is None:
            continue

        # A split without a sample, or with fewer than there are readers.
        samples = counts.get(leaf.split)
        if not samples:
            described = listed(f"{name} {count}" for name, count in counts.items())
            why = "Energon splits by shard"
            mended = "prepare it again with more shards or another --split-ratio"
            if excluded(leaf.folder):
                why = "what its split.yaml excludes is not counted"
                mended = "exclude less in its .nv-meta/split.yaml"
            yield Finding(
                path(DATASET),
                f"the {leaf.split} split of {leaf.folder} is empty ({why}: {described})",
                _without(view, leaf.split, mended),
            )
        elif view.trainer.OWN:
            yield from _streams_without_sample(view, leaf, samples)
        else:
            yield from _loaders_without_sample(view, leaf, samples)


def _split_missing(view: View, gap: Gap) -> Iterator[Finding]:
    # A metadataset without any split is DAT102's.
    if gap.there:
        has = listed(gap.there)
        yield Finding(
            path(DATASET),
            f"metadataset {gap.file} has no split {gap.split}; it has {has}",
            _without(view, gap.split, "add it"),
        )


def _streams_without_sample(view: View, leaf: Leaf, samples: int) -> Iterator[Finding]:
    streams = view[STREAMS]
    empty = 0 if samples < streams else streams_without_sample(leaf.folder, leaf.split, streams)
    if empty:
        yield Finding(
            path(view.key_set_by_user(STREAMS, otherwise=DATASET)),
            f"{empty} of the {streams} streams of split {leaf.split} of {leaf.folder} have only samples that are "
            f"excluded by its split.yaml, and would wait for ever; {samples} samples are left in other places",
            "exclude whole shards, or fewer streams: data.num_streams, dataset.num_workers",
        )
    if samples < streams:
        yield Finding(
            path(view.key_set_by_user(STREAMS, otherwise=DATASET)),
            f"{streams} streams share the {samples} samples of split {leaf.split} of {leaf.folder}; "
            "each needs at least one",
            f"data.num_streams at most {samples}, or fewer dataset.num_workers",
        )


def _loaders_without_sample(view: View, leaf: Leaf, samples: int) -> Iterator[Finding]:
    # Without workers a rank itself is the one that loads.
    dp = view.data_parallel_size
    workers = max(1, view[WORKERS])
    loaders = dp * workers
    if samples < loaders:
        most = samples // dp
        yield Finding(
            path(view.key_set_by_user(WORKERS, otherwise=DATASET)),
            f"DP {dp} x {workers} workers = {loaders} loaders share the {samples} samples of split {leaf.split} "
            f"of {leaf.folder}; each needs at least one",
            f"dataset.num_workers at most {most}",
        )


def _without(view: View, split: str, mended: str) -> str:
    """What to do about a split that is not there: only validation can be done without."""
    if split != "val":
        return mended
    hint = "set dataset.use_train_split_for_val=true"
    if view.trainer.OWN:
        hint += ", or train.eval_iters=0"
    return hint


def _shards_differ(view: View) -> Iterator[Finding]:
    for folder in folders_of(view):
        splits = split_shards(folder)
        counts = shard_counts(folder)
        if splits is not None and counts is not None:
            yield from _differing(folder, splits, counts)


def _differing(folder: FilePath, splits: dict[str, list[str]], counts: dict[str, int]) -> Iterator[Finding]:
    named = set(chain.from_iterable(splits.values()))
    there = shards_there(folder)

    # Shards that are read and are not there, or are not counted.
    missing = sorted(named - there)
    if missing:
        yield Finding(
            path(DATASET),
            f"of the shards that the metadata of {folder} names, {len(missing)} are missing, first {missing[0]}",
            "copy them, or prepare the dataset again",
        )
    uncounted = sorted(named - counts.keys())
    if uncounted:
        yield Finding(
            path(DATASET),
            f"the splits of {folder} name {len(uncounted)} shards whose samples its metadata does not count, "
            f"first {uncounted[0]}",
            "prepare the dataset again",
        )

    # Shards that are there and are not read.
    unnamed = sorted(there - counts.keys())
    if unnamed:
        yield Finding(
            path(DATASET),
            f"{folder} has {len(unnamed)} shards that its metadata does not name, first {unnamed[0]}: "
            "they are never read",
            "prepare the dataset again",
            WARNING,
        )


def _index(view: View) -> Iterator[Finding]:
    for folder in folders_of(view):
        counts = sorted((shard_counts(folder) or {}).items())
        stale = [name for name, count in counts if _is_stale(folder / name, count)]
        if stale:
            yield Finding(
                path(DATASET),
                f"{len(stale)} shards of {folder} have no .tar.idx of as many samples as the metadata counts, "
                f"first {stale[0]}",
                f"run: energon prepare {folder}",
            )


def _is_stale(shard: FilePath, samples: int) -> bool:
    """Whether a shard that is there has no index of so many samples: an offset for each, and one for the end."""
    return shard.is_file() and _offsets(shard.with_suffix(".tar.idx")) != samples + 1


def _offsets(index: FilePath) -> int | None:
    """The offsets in Energon's index of a shard, each of 8 bytes; None without an index."""
    return index.stat().st_size // 8 if index.is_file() else None


def _placeholders(view: View) -> Iterator[Finding]:
    for key in sorted(PATH_KEYS & view.resolved.values.keys()):
        value = view.or_null(key)
        if view.is_set_by_user(key) and isinstance(value, str) and is_placeholder(value):
            # Upstream's own file of overrides waits for its first edit.
            _, _, last = value.rpartition("/")
            severity = HINT if last == "DATASET_FOLDER" else None
            yield Finding(path(key), f"{key} {value} looks like a placeholder", "put the real path", severity)


def _streams(view: View) -> Iterator[Finding]:
    streams = view[STREAMS]
    dp = view.data_parallel_size
    if streams % dp:
        near = listed(nearest_multiples(streams, dp), " or ")
        yield Finding(
            path(STREAMS),
            f"data.num_streams {streams} is not a multiple of the data-parallel size {dp}",
            f"{near}; a rank owns whole streams",
        )


RULES = (
    # What the spec names.
    Rule(
        "RUN102",
        "placeholder-path",
        ERROR,
        _placeholders,
        "A copied example would write to, or read from, a path that nobody meant: upstream creates it in silence.",
        "DFM's own example files",
        level="paths",
    ),
    Rule(
        "DAT101",
        "dataset-not-named",
        HINT,
        _dataset_given,
        "There is nothing to train on; upstream looks into a folder of its container.",
        "NVIDIA DFM pretrain_dit_model.py",
        targets=DIT,
    ),
    Rule(
        "DAT109",
        "address-not-read",
        ERROR,
        _addresses,
        "An address that nothing reads would be taken for a folder of that name, on every rank.",
        "megatron-energon epathlib/epath.py",
        targets=OURS,
    ),
    Rule(
        "DAT102",
        "dataset-missing",
        ERROR,
        _dataset_missing,
        "The loader would fail after the model is built, on every rank.",
        "megatron-energon",
        level="paths",
    ),
    # What the metadata says.
    Rule(
        "DAT103",
        "dataset-metadata-missing",
        ERROR,
        _metadata_missing,
        "Energon cannot open a folder of shards that was not prepared, or not by its own version.",
        "megatron-energon flavors/webdataset",
        level="paths",
    ),
    Rule(
        "DAT104",
        "split-empty",
        ERROR,
        _splits,
        "The loader of an empty split fails, or waits for ever; so does a worker without a sample.",
        "megatron-energon",
        level="paths",
    ),
    Rule(
        "DAT105",
        "shards-differ",
        ERROR,
        _shards_differ,
        "The loader fails when it gets there, which may be hours into the run; samples of a shard that is not named "
        "are never seen, in silence.",
        "megatron-energon",
        level="paths",
    ),
    # How the samples reach the ranks.
    Rule(
        "DAT106",
        "streams-not-divisible",
        ERROR,
        _streams,
        "A sample stream belongs to one data-parallel rank; that is what lets DP change between attempts.",
        "dfmspec/trainer/data/streams.py",
        targets=OURS,
    ),
    Rule(
        "DAT107",
        "loader-kind-fixed",
        ERROR,
        excludes(
            lambda v: v[_LOADER] != "external",
            at=_LOADER,
            message=lambda v: f"{_LOADER} {v[_LOADER]}: Energon's loader is external to Megatron",
            hint="remove it",
        ),
        "Accepted at start; the loader cannot be built, after the model was.",
        "NVIDIA DFM data/common/diffusion_energon_datamodule.py",
        targets=DFM,
    ),
    Rule(
        "DAT108",
        "index-stale",
        ERROR,
        _index,
        "Energon finds samples by the index beside each shard: without, the loader fails; with an old one, it reads "
        "in the middle of samples.",
        "megatron-energon flavors/webdataset/itar.py",
        level="paths",
    ),
)
