"""DAT, RUN, CKP (paths): what the spec says of files and machines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path as FilePath

from dfmspec.diagnostics import Finding, Severity
from dfmspec.energon_metadata import split_counts
from dfmspec.rules.base import BOTH, OURS, Rule, View, path

DATASET = "dataset.path"


def _dataset_given(view: View) -> Iterator[Finding]:
    if view["dataset.path"] is None and view_source(view) == "webdataset":
        yield Finding(path(DATASET), "no dataset is named", "give --dataset-path or dataset.path; or data.source=embedded to try without one")


def view_source(view: View) -> str:
    """data.source; target dfm reads WebDatasets only."""
    return str(view.resolved.values.get("data.source", "webdataset"))


def _dataset(view: View) -> FilePath | None:
    """The dataset's folder when it is there."""
    name = view[DATASET]
    if name is None or view_source(view) != "webdataset" or _is_placeholder(name):
        return None
    folder = FilePath(name).expanduser()
    return folder if folder.is_dir() else None


def _dataset_missing(view: View) -> Iterator[Finding]:
    name = view[DATASET]
    if name is None or view_source(view) != "webdataset" or _is_placeholder(name):
        return
    folder = FilePath(name).expanduser()
    if folder.is_file():
        yield Finding(path(DATASET), f"dataset {name} is a file", "name the folder that holds the shards")
    elif not folder.is_dir():
        yield Finding(path(DATASET), f"dataset {name} does not exist", "check the path; dfmspec data prepare makes one")


def _metadata_missing(view: View) -> Iterator[Finding]:
    folder = _dataset(view)
    if folder is None or (folder / ".nv-meta" / "dataset.yaml").exists():
        return
    if list(folder.glob("*.yaml")):
        return  # a metadataset
    yield Finding(
        path(DATASET), f"dataset {folder} has no Energon metadata (.nv-meta/dataset.yaml)",
        f"run: energon prepare --sample-type CrudeWebdataset {folder}",
    )  # fmt: skip


def _splits(view: View) -> Iterator[Finding]:
    folder = _dataset(view)
    counts = split_counts(folder) if folder else None
    if counts is None:
        return
    ours = view.resolved.spec.target == "megatron_core"
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
        elif ours and counts[split] < view["data.num_streams"]:
            yield Finding(
                path("data.num_streams" if view.is_users("data.num_streams") else DATASET),
                f"{view['data.num_streams']} streams share the {counts[split]} samples of split {split}; each needs at least one",
                f"data.num_streams at most {counts[split]}, or fewer dataset.num_workers",
            )  # fmt: skip


def _described(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _placeholders(view: View) -> Iterator[Finding]:
    for key in (DATASET, "checkpoint.save", "checkpoint.load"):
        value = view[key]
        if view.is_users(key) and isinstance(value, str) and _is_placeholder(value):
            yield Finding(path(key), f"{key} {value} looks like a placeholder", "put the real path", Severity.WARNING)


def _is_placeholder(value: str) -> bool:
    return bool(re.search(r"(^|/)path/to(/|$)|DATASET_FOLDER|<[^>]+>|/your/", value))


def _world_size(view: View) -> Iterator[Finding]:
    if not view.resolved.world_size_is_given:
        nproc = view["cluster.nproc_per_node"]
        yield Finding(
            path("cluster.nproc_per_node"), f"the number of processes is not given; checked with {view.layout.world_size}, the fewest that the layout needs",
            f"give cluster.nproc_per_node={max(nproc, 2)}, for example, to check the run that is meant",
        )  # fmt: skip


def _load_missing(view: View) -> Iterator[Finding]:
    folder, step = view["checkpoint.load"], view["checkpoint.ckpt_step"]
    if not view.is_users("checkpoint.load") or not isinstance(folder, str) or "${" in folder or _is_placeholder(folder):
        return
    if folder == view["checkpoint.save"]:  # a first run has nothing there yet
        return
    place = FilePath(folder).expanduser()
    if not place.is_dir():
        yield Finding(path("checkpoint.load"), f"checkpoint folder {folder} does not exist", "check the path, or remove it to start afresh")
    elif step is not None and not (place / f"iter_{step:07d}").is_dir():
        have = sorted(int(found.name[5:]) for found in place.glob("iter_*") if found.name[5:].isdigit())
        yield Finding(
            path("checkpoint.load"), f"{folder} has no checkpoint of iteration {step}", f"it has: {', '.join(map(str, have)) or 'none'}"
        )


def _resume_unknown(view: View) -> Iterator[Finding]:
    resume = view["run.resume"]
    if isinstance(resume, int):
        if resume < 1:
            yield Finding(path("run.resume"), f"run.resume {resume} is no iteration", "1 or more; or auto, require, never, a folder")
    elif resume not in ("auto", "require", "never") and not FilePath(resume).expanduser().is_dir():
        yield Finding(path("run.resume"), f"run.resume {resume} is no word that it knows, and no folder", "auto, require, never, an iteration, or a folder of checkpoints")


RULES = (
    Rule("RUN103", "resume-not-known", Severity.ERROR, _resume_unknown,
         "The run would fail after the model is built.",
         ("run.resume=requrie",), ("run.resume=auto",), BOTH, "paths"),
    Rule("RUN101", "world-size-not-given", Severity.HINT, _world_size,
         "Batch and layout arithmetic need the number of processes.", (), ("cluster.nproc_per_node=1",)),
    Rule("RUN102", "placeholder-path", Severity.WARNING, _placeholders,
         "A copied example would write to, or read from, a path that nobody meant.",
         ("checkpoint.save=/path/to/checkpoints",), ("checkpoint.save=/data/checkpoints",)),
    Rule("DAT101", "dataset-not-named", Severity.HINT, _dataset_given,
         "There is nothing to train on.", (), ("data.source=embedded",)),
    Rule("DAT102", "dataset-missing", Severity.ERROR, _dataset_missing,
         "The loader would fail after the model is built, on every rank.",
         ("dataset.path=/nonexistent/dataset",), ("data.source=embedded",), BOTH, "paths"),
    Rule("DAT103", "dataset-metadata-missing", Severity.ERROR, _metadata_missing,
         "Energon cannot open a folder of shards that was not prepared.",
         ("dataset.path=tests/corpus/unprepared",), ("data.source=embedded",), BOTH, "paths"),
    Rule("DAT104", "split-empty", Severity.ERROR, _splits,
         "The loader of an empty split fails, or waits for ever.",
         ("dataset.path=tests/corpus/no_val_split",), ("dataset.path=tests/corpus/no_val_split", "dataset.use_train_split_for_val=true"),
         BOTH, "paths"),
    Rule("CKP104", "checkpoint-missing", Severity.ERROR, _load_missing,
         "Upstream starts from iteration 0 in silence; dfmspec's trainer stops.",
         ("checkpoint.load=/nonexistent/checkpoints",), (), OURS, "paths"),
)  # fmt: skip
