"""CKP: what is saved, where, and what a run resumes from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

from dfmspec.bounded import METADATA_BYTES, read_text
from dfmspec.check.rules.base import (
    DFM,
    ERROR,
    HINT,
    ITERS,
    OURS,
    PP,
    TP,
    WARNING,
    Rule,
    View,
    as_yaml,
    excludes,
    listed,
    path,
    requires,
)
from dfmspec.check.rules.dataset import is_placeholder
from dfmspec.diagnostics import Finding
from dfmspec.estimate.disk import checkpoint_bytes
from dfmspec.figures import counted, size
from dfmspec.read.document import parse_document
from dfmspec.spec.checkpoints import (
    MANIFEST,
    RUN_CONFIG,
    committed_iterations,
    named_checkpoint,
    of_another,
    without_tags,
)
from dfmspec.spec.iterations import folder_of, iteration_in, iterations
from dfmspec.spec.network import NETWORK
from dfmspec.spec.paths import RUN_DIR, is_relative, local_path
from dfmspec.spec.resume import Resume

SAVE = "checkpoint.save"
LOAD = "checkpoint.load"
STEP = "checkpoint.ckpt_step"
INTERVAL = "checkpoint.save_interval"
KEEP = "checkpoint.most_recent_k"
FORMAT = "checkpoint.ckpt_format"
FINETUNE = "checkpoint.finetune"
_PRETRAINED = "checkpoint.pretrained_checkpoint"
_NON_PERSISTENT = "checkpoint.non_persistent_ckpt_type"
_SAME_STRUCTURE = "checkpoint.ckpt_assume_constant_structure"
_WRITES_INTO_IT = ("checkpoint.async_save", "logger.log_progress")
"""Switches of what needs the folder of the checkpoints."""
_NAME_THE_FOLDER = "name the folder that holds the iter_ folders"


def _save_interval(view: View) -> Iterator[Finding]:
    folder = view[SAVE]
    interval = view.or_null(INTERVAL)
    iters = view.or_null(ITERS)

    # An empty name is a folder to the operating system.
    if folder == "":
        yield Finding(
            path(SAVE),
            f"{SAVE} is empty: nothing is saved where the run expects it",
            "name a folder, or leave it out for the run directory",
            ERROR,
        )
    if not view.is_set_by_user(INTERVAL) or iters is None:
        return

    # 0 and null differ in whether the last iteration is saved.
    if interval == 0:
        yield Finding(
            path(INTERVAL),
            "save_interval 0: not even the last iteration is saved",
            "set it to a number of iterations",
            HINT,
        )
    elif interval is None:
        yield Finding(
            path(INTERVAL),
            "save_interval null: only the last iteration is saved",
            "set it to a number of iterations",
        )
    elif interval > iters:
        yield Finding(
            path(INTERVAL),
            f"save_interval {interval} is longer than the run's {iters} iterations",
            "only the last iteration is saved; a run that is killed before starts over",
        )


def _shared(view: View) -> Iterator[Finding]:
    nnodes = view["cluster.nnodes"]
    if nnodes == 1:
        return
    for key in (SAVE, LOAD):
        origin = view.resolved.spec.origins[key]
        text = view.resolved.spec.values[key]
        if origin.is_set_by_user and is_relative(text):
            yield Finding(
                path(key),
                f"{key} {text} is relative, and {nnodes} nodes must see one folder",
                "an absolute path on a file system that all nodes share",
            )


def _nearest_existing(place: FilePath) -> FilePath:
    """A path, or the innermost folder above it that is there."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def _most_kept(saves: int, keep: int | None) -> int:
    """How many checkpoints lie on the disk at once: while the next one is saved, the last one is still there."""
    if keep is None or keep < 1:
        return saves
    return min(saves, max(keep, 2))


def _budget(view: View) -> Iterator[Finding]:
    folder = view[SAVE]
    interval = view[INTERVAL]
    iters = view[ITERS]
    keep = view.or_null(KEEP)
    unknown_size = any(key.startswith("model.") for key in view.resolved.unknown)
    # A place that nobody named is on the machine that will train, which may be another.
    is_here = view.starts or bool(view.set_by_user(SAVE, "run.output_dir"))
    if not interval or not iters or unknown_size or not is_here:
        return

    # What is needed.
    saves = -(-iters // interval)
    kept = _most_kept(saves, keep)
    values = view.resolved.values
    each = checkpoint_bytes(view.trainer.parameters(values), averaged="diffusion.ema_decay" in values)

    # What there is.
    run_dir = str(view["run.output_dir"])
    place = _nearest_existing(local_path(str(folder).replace(RUN_DIR, run_dir)))
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    if kept * each <= free:
        return

    yield Finding(
        path(view.key_set_by_user(INTERVAL, otherwise=SAVE)),
        f"{counted(kept, 'checkpoint')} of about {size(each)}: {size(kept * each)}, and {place} has {size(free)} free",
        f"set {KEEP}, or a larger {INTERVAL}",
    )


def _writable(view: View) -> Iterator[Finding]:
    text = view[SAVE]
    if not view.set_by_user(SAVE) or "${" in text or is_placeholder(text):
        return
    place = local_path(text)
    if place.is_file():
        yield Finding(path(SAVE), f"{SAVE} {text} is a file", "name a folder")
        return
    place = _nearest_existing(place)
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(
            path(SAVE),
            f"{SAVE} {text} cannot be created: {place} is not writable here",
            "choose a folder that is, on every node",
        )


def _folder(view: View, key: str) -> FilePath | None:
    """The folder that a key names on this machine; None where it names none, or one elsewhere."""
    return _on_this_machine(view.or_null(key))


def _on_this_machine(text: Any) -> FilePath | None:
    """The folder that a value of a key names; None where it is no path, or one elsewhere."""
    if not isinstance(text, str):
        return None
    elsewhere = "${" in text or "://" in text or is_placeholder(text)
    return None if elsewhere else local_path(text)


_TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")


def _load_missing(view: View) -> Iterator[Finding]:
    folder = _folder(view, LOAD)
    step = view.or_null(STEP)
    if folder is None or not view.set_by_user(LOAD):
        return
    load = view[LOAD]
    # A run that resumes from its own folder has nothing there when it starts first.
    if load == view.or_null(SAVE) and step is None:
        return

    own = view.trainer.OWN
    have = committed_iterations(folder, own=own)
    if not folder.is_dir():
        yield Finding(
            path(LOAD),
            f"checkpoint folder {load} does not exist",
            "check the path, or remove it to start afresh",
        )
    elif _whose(view, folder) is not None:
        return
    elif step is not None and step not in have:
        lacks = "no whole checkpoint" if (folder / folder_of(step)).is_dir() else "no checkpoint"
        there = listed(have) or "none"
        yield Finding(
            path(view.key_set_by_user(STEP, otherwise=LOAD)),
            f"{load} has {lacks} of iteration {step}",
            f"it has: {there}",
        )
    elif own:
        yield from _nothing_to_train(view, folder, have, step)
    elif not any((folder / name).exists() for name in _TRACKERS):
        hint = _NAME_THE_FOLDER
        if have:
            hint = f"name it with checkpoint.load, and checkpoint.ckpt_step one of {listed(have)}"
        yield Finding(
            path(LOAD),
            f"{load} has no tracker file (latest_train_state.pt), so upstream takes it for no checkpoint at all",
            hint,
        )


def _nothing_to_train(view: View, folder: FilePath, have: list[int], step: int | None) -> Iterator[Finding]:
    load = view[LOAD]

    # Saves that were not finished, and a folder that is itself one of iter_*, which is one too deep.
    begun = iterations(folder)
    if begun and not have:
        yield Finding(
            path(LOAD),
            f"{load} holds no whole checkpoint: {folder_of(begun[-1])} has no {MANIFEST}, which is written last",
            "name a folder that does, or copy it again",
        )
        return
    if not have:
        of_one = iteration_in(folder.name)
        hint = _NAME_THE_FOLDER if of_one is None else f"name {folder.parent}, and {STEP} {of_one}"
        yield Finding(path(LOAD), f"{load} holds no iter_ folder, and so no checkpoint to resume from", hint)
        return

    # A run that resumes from its own folder may be complete.
    begins = step or have[-1]
    iters = view[ITERS]
    if begins < iters or load == view.or_null(SAVE):
        return
    hint = f"a larger {ITERS}"
    earlier = [iteration for iteration in have if iteration < iters]
    if earlier:
        hint += f", or {STEP} {listed(earlier)}"
    yield Finding(
        path(LOAD),
        f"{load} goes on after iteration {begins}, but {ITERS} is {iters}: nothing would be trained",
        hint,
    )


def _chosen(view: View, folder: FilePath) -> FilePath | None:
    """The checkpoint of a folder that a run goes on from: of ckpt_step, else the newest finished one, else any."""
    step = view.or_null(STEP)
    if step is not None:
        return folder / folder_of(step)
    have = committed_iterations(folder, own=view.trainer.OWN) or iterations(folder)
    return folder / folder_of(have[-1]) if have else None


def _whose(view: View, folder: FilePath) -> str | None:
    """Whose the checkpoint is that a run would go on from; None: its trainer's own, or nobody knows."""
    # A folder that is itself a checkpoint is named one too deep, and says as well whose it is.
    chosen = folder if iteration_in(folder.name) is not None else _chosen(view, folder)
    return None if chosen is None else of_another(chosen, own=view.trainer.OWN)


def _other_program(view: View) -> Iterator[Finding]:
    own = view.trainer.OWN
    others = "target dfm goes on from it" if own else "target megatron_core goes on from it"
    resume = Resume.parse(view["run.resume"])
    if resume.kind == "never":
        return
    key = "run.resume"
    text = resume.folder
    if text is None:
        key = view.key_set_by_user(LOAD, otherwise=SAVE)
        text = view[LOAD]
    folder = _on_this_machine(text)
    whose = None if folder is None or not folder.is_dir() else _whose(view, folder)
    if whose is not None:
        yield Finding(
            path(key),
            f"the checkpoint in {text} is {whose}, and target {view.target} cannot go on from it",
            f"{others}; name another folder to start afresh",
        )


_MOST_FOLDERS = 5000
"""How many folders are looked into for checkpoints of other runs: a check takes seconds, also over a large disk."""


def _checkpoints_below(folder: FilePath) -> list[FilePath]:
    """All that upstream takes for a checkpoint below a folder, to any depth."""
    found = []
    for place, folders, files in islice(os.walk(folder), _MOST_FOLDERS):
        found += [FilePath(place) / name for name in folders + files if name.startswith("iter_")]
    return found


def _foreign(view: View) -> Iterator[Finding]:
    folder = _folder(view, SAVE)
    keep = view[KEEP]
    if folder is None or not view.set_by_user(SAVE) or keep is None or keep < 1:
        return
    save = view[SAVE]
    below = _checkpoints_below(folder)

    # A name without a number stops the first save, before anything is removed.
    odd = [found for found in below if iteration_in(found.name) is None]
    if odd:
        first = min(odd)
        yield Finding(
            path(KEEP),
            f"{KEEP} {keep} sorts all iter_* below {save} by number, and {first} has none",
            f"rename it, or give {SAVE} a folder of its own",
        )
        return

    others = [found for found in below if found.parent != folder]
    if others:
        first = min(others)
        parent = save.rstrip("/")
        yield Finding(
            path(KEEP),
            f"{KEEP} {keep} removes all but the newest {keep} of the iter_* anywhere below {save}: "
            f"{len(others)} of them belong to others (first: {first})",
            f"give {SAVE} a folder of its own, such as {parent}/{view.resolved['name']}; or set {KEEP} to -1",
        )


_TRACKER_BYTES = 100
"""Of a file that holds an iteration."""


def _resumes_unasked(view: View) -> Iterator[Finding]:
    folder = _folder(view, LOAD)
    iters = view[ITERS]
    if folder is None or not folder.is_dir() or view[LOAD] != view.or_null(SAVE):
        return
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        at = int(read_text(tracker, most=_TRACKER_BYTES).strip())
    except (OSError, ValueError):
        return
    if at >= iters:
        load = view[LOAD]
        yield Finding(
            path(LOAD),
            f"{load} is at iteration {at} already, and the run ends at {iters}: nothing would be trained",
            f"train.train_iters above {at}, or a new folder",
        )


def _run_config(view: View) -> dict[str, Any] | None:
    """What the checkpoint to be loaded says of its own configuration."""
    folder = _folder(view, LOAD)
    if folder is None or not folder.is_dir():
        return None

    # Without a step upstream loads the newest.
    chosen = _chosen(view, folder)
    file = None if chosen is None else chosen / RUN_CONFIG
    if file is None or not file.is_file():
        return None

    text = read_text(file, most=METADATA_BYTES, errors="replace")
    data = parse_document(without_tags(text).encode(), str(file)).data
    return data if isinstance(data, dict) else None


_ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "kv_channels",
    "crossattn_emb_size",
    "max_img_h",
    "max_img_w",
    "max_frames",
    "patch_spatial",
    "num_joint_layers",
    "num_single_layers",
    "guidance_embed",
)
"""The fields of section `model` that set the shapes of parameters."""


def _own_config(view: View) -> dict[str, Any] | None:
    """What a checkpoint of dfmspec's, from which the run would go on, says of the configuration that it is of."""
    resume = Resume.parse(view["run.resume"])
    if resume.kind == "never":
        return None
    folder = _folder(view, LOAD) if resume.folder is None else local_path(resume.folder)
    if folder is None or not folder.is_dir():
        return None
    folder = _saved_in(folder)
    chosen = _chosen(view, folder)
    file = None if chosen is None else chosen / MANIFEST
    if file is None or not file.is_file():
        return None
    try:
        stored = json.loads(read_text(file, most=METADATA_BYTES))["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # a damaged one is told when it is read
    return stored if isinstance(stored, dict) else None


def _saved_in(folder: FilePath) -> FilePath:
    """The folder of the checkpoints of a run directory; of any other folder, itself."""
    inside = folder / "checkpoints"
    return inside if (folder / MANIFEST).is_file() and inside.is_dir() else folder


def _other_model(view: View) -> Iterator[Finding]:
    config = _own_config(view) if view.trainer.OWN else _run_config(view)
    saved = (config or {}).get("model")
    if not isinstance(saved, dict):
        return
    for name in NETWORK if view.trainer.OWN else _ARCHITECTURE:
        key = f"model.{name}"
        before = saved.get(name)
        if key not in view.resolved.values or not isinstance(before, int):
            continue
        now = view[key]
        if before != now:
            theirs = as_yaml(before)
            yield Finding(
                path(view.key_set_by_user(key, otherwise=view.key_set_by_user(LOAD, otherwise="run.resume"))),
                f"{key} is {as_yaml(now)}, and the checkpoint's is {theirs}",
                f"set {key} to {theirs}, or load another checkpoint",
            )


def _loads_sharded_state(view: View) -> bool:
    """Whether the run wants the state of the distributed optimizer from its checkpoint."""
    loads_state = view["checkpoint.load_optim"] and not view[FINETUNE]
    return bool(loads_state and view["optimizer.use_distributed_optimizer"])


def _other_layout(view: View) -> Iterator[Finding]:
    config = _run_config(view) or {}
    model = config.get("model")
    checkpoint = config.get("checkpoint")
    if not isinstance(model, dict) or not _loads_sharded_state(view):
        return
    # A state that was saved fully reshardable fits any layout.
    if isinstance(checkpoint, dict) and checkpoint.get("dist_ckpt_optim_fully_reshardable"):
        return
    for key in (TP, PP):
        before = model.get(key.removeprefix("model."))
        if not isinstance(before, int):
            continue
        now = view[key]
        if before != now:
            yield Finding(
                path(key),
                f"{key} is {now}, and the checkpoint's optimizer state was saved for {before}",
                "keep the layout, or set checkpoint.load_optim to false",
            )


def _step_past_the_end(view: View) -> bool:
    return bool(view[STEP] >= view[ITERS])


def _step_without_folder(view: View) -> bool:
    return view.or_null(STEP) is not None and view.or_null(LOAD) is None


def _nowhere_to_save(view: View) -> Iterator[Finding]:
    if view.or_null(SAVE) is not None:
        return
    for key in _WRITES_INTO_IT:
        if view.or_null(key):
            yield Finding(
                path(SAVE),
                f"{SAVE} is null, and {key} {as_yaml(view[key])} needs a folder",
                f"name a folder, or set {key} to false",
            )
    if view.network == "dit" and view["train.eval_iters"]:
        yield Finding(
            path(SAVE),
            f"{SAVE} is null, and each evaluation draws a video into a folder beside the checkpoints",
            "name a folder, or set train.eval_iters to 0",
        )
    if view.or_null("logger.wandb_project") and not view.or_null("logger.wandb_save_dir"):
        yield Finding(
            path(SAVE),
            f"{SAVE} is null, and Weights & Biases keeps its files beside the checkpoints",
            "name a folder, or set logger.wandb_save_dir",
        )


def _keeps_nothing(view: View) -> bool:
    keep = view.or_null(KEEP)
    return keep is not None and (keep == 0 or keep < -1)


def _structure_changes(view: View) -> bool:
    return view[_SAME_STRUCTURE] and view.or_null("train.rampup_batch_size") is not None


def _pretrained_missing(view: View) -> bool:
    folder = _folder(view, _PRETRAINED)
    return folder is not None and not folder.exists()


def _pretrained_of_no_use(view: View) -> Iterator[Finding]:
    place = _folder(view, _PRETRAINED)
    if place is None or not place.exists():
        return
    chosen = named_checkpoint(place) if place.is_dir() else None
    whose = None if chosen is None else of_another(chosen, own=False)
    find = _no_use_to_us if view.target in OURS else _no_use_to_upstream
    for message, hint in find(view, place, chosen, whose):
        yield Finding(path(_PRETRAINED), message, hint)


def _no_use_to_upstream(
    view: View, place: FilePath, chosen: FilePath | None, whose: str | None
) -> Iterator[tuple[str, str]]:
    """Megatron-Bridge starts from a folder of checkpoints, by what tells in it which is the newest."""
    named = view[_PRETRAINED]
    another = "name a folder of checkpoints of this network"
    if view.network == "dit":
        another = "dfmspec export RUN -o FOLDER --for dfm writes such a folder of a run's weights"
    if place.is_file():
        yield f"{named} is a file, and the script starts from a folder of checkpoints", another
    elif whose is not None:
        yield f"the checkpoint in {named} is {whose}, which the script cannot read", another
    elif not any((place / tracker).exists() for tracker in _TRACKERS):
        is_one = iteration_in(place.name) is not None
        yield (
            f"{named} has no {_TRACKERS[0]}, by which the script finds what to start from",
            _NAME_THE_FOLDER if is_one else "name a folder of checkpoints",
        )


_LARGEST_HEADER = 100_000_000
"""Of a safetensors file, as its own readers have it."""


def _other_weights(view: View, file: FilePath) -> Iterator[tuple[str, str]]:
    """A file of weights that is of another network, by the shapes in its header; or none at all."""
    named = view[_PRETRAINED]
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(length) if length <= _LARGEST_HEADER else b""
    try:
        tensors = {name: [*entry["shape"]] for name, entry in json.loads(header).items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield f"{named} is no safetensors file", "dfmspec export RUN -o weights.safetensors writes one"
        return
    layers = {match[1] for match in map(re.compile(r"decoder\.layers\.(\d+)\.").match, tensors) if match}
    there = {"model.num_layers": len(layers)}
    there["model.hidden_size"] = next(iter(tensors.get("x_embedder.weight", [])), 0)
    for key, theirs in there.items():
        if theirs and theirs != view[key]:
            yield (
                f"{named} is of another network: {key} is {theirs} there, and {view[key]} here",
                f"set {key} to {theirs}",
            )


def _no_use_to_us(view: View, place: FilePath, chosen: FilePath | None, whose: str | None) -> Iterator[tuple[str, str]]:
    named = view[_PRETRAINED]
    if place.is_file():
        yield from _other_weights(view, place)
    elif place.is_dir() and chosen is None:
        yield (
            f"{named} holds no finished checkpoint",
            "name a safetensors file, or a folder of Megatron-Bridge's checkpoints",
        )
    elif whose is not None:
        yield (
            f"the checkpoint in {named} is {whose}, and a run starts from a file of its weights",
            f"dfmspec export {named} -o weights.safetensors, and name that file",
        )


_CONFIG = "Megatron-Bridge training/config.py, CheckpointConfig.finalize"
_CK = "Megatron-Bridge training/checkpointing.py"

RULES = (
    # When it saves, and from where it goes on.
    Rule(
        "CKP102",
        "save-interval-beyond-the-end",
        WARNING,
        _save_interval,
        "Nothing is saved until the end, or at all, in silence: any interruption loses the whole run.",
        "Megatron-Bridge training/train.py, pretrain.py",
    ),
    Rule(
        "CKP103",
        "resume-past-the-end",
        ERROR,
        excludes(
            _step_past_the_end,
            at=STEP,
            message=lambda v: f"{STEP} {v[STEP]} is not before the last iteration {v[ITERS]}: nothing would be trained",
            hint="raise train.train_iters",
        ),
        "Accepted; the run would end at once, and look like a success.",
        "Megatron-Bridge training/pretrain.py",
    ),
    Rule(
        "CKP104",
        "checkpoint-missing",
        ERROR,
        _load_missing,
        "Upstream takes a folder without a tracker for no checkpoint, and starts from iteration 0 in silence; "
        "exit_on_missing_checkpoint is not even read. dfmspec's trainer stops.",
        "Megatron-Bridge training/setup.py and utils/checkpoint_utils.py",
        level="paths",
    ),
    Rule(
        "CKP122",
        "checkpoint-of-another-program",
        ERROR,
        _other_program,
        "The run ends when it looks for its checkpoint, after the processes have started.",
        "Megatron-Bridge training/checkpointing.py; dfmspec's checkpoints",
        level="paths",
    ),
    Rule(
        "CKP105",
        "checkpoint-path-relative",
        WARNING,
        _shared,
        "Each node writes its shards into its own working directory: the checkpoint is in pieces, and nobody notices "
        "before it is needed.",
        _CK,
    ),
    Rule(
        "CKP106",
        "resume-step-without-folder",
        ERROR,
        excludes(
            _step_without_folder,
            at=STEP,
            message="checkpoint.ckpt_step is set, and checkpoint.load is null",
            hint="name the folder with checkpoint.load",
        ),
        "A ValueError at start; beside a null checkpoint.save, which leaves nothing to derive the folder from, "
        "upstream looks into one of its own in silence.",
        _CONFIG,
        targets=DFM,
    ),
    # How it saves.
    Rule(
        "CKP123",
        "nowhere-to-save",
        ERROR,
        _nowhere_to_save,
        "Asynchronous saves are refused at start; the rest is accepted, and fails where the path is put together: "
        "in the first evaluation, which may be hours into the run.",
        f"{_CONFIG}; Megatron-Bridge training/state.py and setup.py; NVIDIA DFM model/dit/dit_step.py",
        targets=DFM,
    ),
    Rule(
        "CKP107",
        "reshardable-in-two-ways",
        ERROR,
        requires(
            "checkpoint.dist_ckpt_optim_fully_reshardable",
            ("checkpoint.distrib_optim_fully_reshardable_mem_efficient", False),
            because="the two exclude each other",
        ),
        "Asserted at start.",
        _CONFIG,
        targets=DFM,
    ),
    Rule(
        "CKP108",
        "checkpoint-format-unusable",
        ERROR,
        excludes(
            lambda v: v[FORMAT] not in ("torch_dist", "fsdp_dtensor"),
            at=FORMAT,
            message=lambda v: f"{FORMAT} {v[FORMAT]} cannot be saved or loaded at this revision",
            hint="torch_dist; fsdp_dtensor with Megatron FSDP",
        ),
        "Accepted at start; the first save fails, hours into the run.",
        _CK,
        targets=DFM,
    ),
    Rule(
        "CKP109",
        "async-save-impossible",
        ERROR,
        requires(
            "checkpoint.async_save",
            ("checkpoint.use_persistent_ckpt_worker", True),
            (FORMAT, "torch_dist"),
            because="asynchronous saves are made for it alone",
        ),
        "Asserted at start.",
        _CONFIG,
        targets=DFM,
    ),
    Rule(
        "CKP110",
        "main-parameters-with-optimizer",
        ERROR,
        requires(
            "checkpoint.load_main_params_from_ckpt",
            ("checkpoint.load_optim", False),
            because="the optimizer's state holds the main parameters too",
        ),
        "Asserted at start.",
        _CONFIG,
        targets=DFM,
    ),
    # What is kept, and what fits the disk.
    Rule(
        "CKP111",
        "keeps-nothing",
        ERROR,
        excludes(
            _keeps_nothing,
            at=KEEP,
            message=lambda v: f"{KEEP} {v[KEEP]} keeps everything, by an accident of slicing",
            hint="-1 for all, or 1 or more",
        ),
        "No checkpoint is ever removed, in silence, and the disk fills.",
        _CK,
        targets=DFM,
    ),
    Rule(
        "CKP121",
        "retention-beyond-the-run",
        ERROR,
        _foreign,
        "After each save upstream searches the folder to any depth and removes what is older, in silence: "
        "checkpoints of other runs are lost. A name without a number is a ValueError at the first save.",
        f"{_CK}, cleanup_old_non_persistent_checkpoint",
        targets=DFM,
        level="paths",
    ),
    Rule(
        "CKP112",
        "non-persistent-checkpoints-unusable",
        ERROR,
        excludes(
            lambda v: v[_NON_PERSISTENT] not in (None, "global"),
            at=_NON_PERSISTENT,
            message=lambda v: (
                f"{_NON_PERSISTENT} {v[_NON_PERSISTENT]} needs a package that DFM does not install, or is not known"
            ),
            hint="null, or global",
        ),
        "Accepted at start; fails when the manager is made or at the first save.",
        _CK,
        targets=DFM,
    ),
    Rule(
        "CKP113",
        "checkpoint-budget",
        WARNING,
        _budget,
        "The disk fills in the middle of the run, and the save that fails may be the last one.",
        "14 bytes a parameter: bf16 weights, fp32 main weights, two moments",
        level="paths",
    ),
    Rule(
        "CKP114",
        "checkpoint-folder-not-writable",
        ERROR,
        _writable,
        "The first save fails, hours into the run.",
        "the file system",
        level="paths",
    ),
    # What the folder holds already.
    Rule(
        "CKP115",
        "run-already-complete",
        ERROR,
        _resumes_unasked,
        "Upstream resumes from checkpoint.load by itself: the run ends at once, as a success.",
        _CK,
        targets=DFM,
        level="paths",
    ),
    Rule(
        "CKP116",
        "checkpoint-of-another-model",
        ERROR,
        _other_model,
        "Shapes do not match when the checkpoint is loaded, after the model is built.",
        f"dfmspec's trainer; {_CK}",
        level="paths",
    ),
    Rule(
        "CKP117",
        "optimizer-state-of-another-layout",
        ERROR,
        _other_layout,
        "A RuntimeError when the checkpoint is loaded: the state is not reshardable by default.",
        _CK,
        targets=DFM,
        level="paths",
    ),
    Rule(
        "CKP118",
        "finetune-over-its-source",
        WARNING,
        excludes(
            lambda v: v[FINETUNE] and v[SAVE] == v[LOAD],
            at=FINETUNE,
            message="finetune starts at iteration 0 and saves into the folder that it loads from, "
            "and starts at 0 again after each interruption",
            hint="set checkpoint.save to another folder; "
            "pretrained_checkpoint alone turns finetune on when nothing is saved yet",
        ),
        "The checkpoints that it started from are overwritten one by one, in silence.",
        _CK,
        targets=DFM,
    ),
    Rule(
        "CKP119",
        "structure-assumed-constant",
        HINT,
        excludes(
            _structure_changes,
            at=_SAME_STRUCTURE,
            message="ckpt_assume_constant_structure with a batch size that ramps up: what is saved may change",
            hint="set it to false",
        ),
        "The plan of the first save is used for all.",
        _CK,
        targets=DFM,
    ),
    Rule(
        "CKP120",
        "pretrained-checkpoint-missing",
        ERROR,
        excludes(
            _pretrained_missing,
            at=_PRETRAINED,
            message=lambda v: f"{_PRETRAINED} {v[_PRETRAINED]} does not exist",
            hint="check the path",
        ),
        "The run fails after the model is built.",
        _CK,
        level="paths",
    ),
    Rule(
        "CKP124",
        "pretrained-checkpoint-of-no-use",
        ERROR,
        _pretrained_of_no_use,
        "The run ends after the model is built.",
        f"dfmspec's trainer; {_CK}",
        level="paths",
    ),
)
