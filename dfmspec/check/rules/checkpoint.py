"""CKP: what is saved, where, and what a run resumes from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

from dfmspec.check.rules.base import ALL, DFM, ERROR, HINT, ITERS, PP, TP, WARNING, Rule, View, excludes, path, requires, shown
from dfmspec.check.rules.dataset import is_placeholder
from dfmspec.diagnostics import Finding
from dfmspec.estimate.disk import checkpoint_bytes
from dfmspec.read.document import parse_document
from dfmspec.spec.paths import is_relative, local_path

SAVE, LOAD, STEP, INTERVAL, KEEP = (f"checkpoint.{name}" for name in ("save", "load", "ckpt_step", "save_interval", "most_recent_k"))


def _save_interval(view: View) -> Iterator[Finding]:
    interval, iters = view[INTERVAL], view[ITERS]
    if view[SAVE] == "":
        yield Finding(path(SAVE), f"{SAVE} is empty: nothing is saved where the run expects it", "name a folder, or leave it out for the run directory", ERROR)
    if not view.is_users(INTERVAL) or iters is None:
        return
    if not interval:
        last = "not even the last iteration is saved" if interval == 0 else "only the last iteration is saved"
        yield Finding(path(INTERVAL), f"save_interval {'null' if interval is None else interval}: {last}", "set it to a number of iterations", HINT if interval == 0 else None)
    elif interval > iters:
        yield Finding(path(INTERVAL), f"save_interval {interval} is longer than the run's {iters} iterations", "only the last iteration is saved; a run that is killed before starts over")


def _shared(view: View) -> Iterator[Finding]:
    if view["cluster.nnodes"] == 1:
        return
    for key in (SAVE, LOAD):
        origin = view.resolved.spec.origins[key]
        text = view.resolved.spec.values[key]
        if origin.is_users and is_relative(text):
            yield Finding(path(key), f"{key} {text} is relative, and {view['cluster.nnodes']} nodes must see one folder", "an absolute path on a file system that all nodes share")


def _budget(view: View) -> Iterator[Finding]:
    folder, interval, iters, keep = view[SAVE], view[INTERVAL], view[ITERS], view[KEEP]
    if not interval or not iters or any(key.startswith("model.") for key in view.resolved.unknown):
        return
    saves = -(-iters // interval)
    kept = saves if keep is None or keep < 1 else min(saves, max(keep, 2))
    values = view.resolved.values
    each = checkpoint_bytes(view.trainer.parameters(values), averaged="diffusion.ema_decay" in values)
    place = local_path(str(folder).replace("${RUN_DIR}", str(view["run.output_dir"])))
    while not place.exists() and place != place.parent:
        place = place.parent
    disk = os.statvfs(place)
    free = disk.f_bavail * disk.f_frsize
    if kept * each > free:
        yield Finding(
            path(INTERVAL if view.is_users(INTERVAL) else SAVE), f"{kept} checkpoints of about {each / 1e9:.1f} GB are {kept * each / 1e9:.0f} GB, and {place} has {free / 1e9:.0f} GB free",
            f"set {KEEP}, or a larger {INTERVAL}", None if view.users(INTERVAL, SAVE) else HINT,
        )  # fmt: skip


def _writable(view: View) -> Iterator[Finding]:
    text = view[SAVE]
    if not view.users(SAVE) or "${" in text or is_placeholder(text):
        return
    place = local_path(text)
    if place.is_file():
        yield Finding(path(SAVE), f"{SAVE} {text} is a file", "name a folder")
        return
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding(path(SAVE), f"{SAVE} {text} cannot be created: {place} is not writable here", "choose a folder that is, on every node")


def _folder(view: View, key: str) -> FilePath | None:
    text = view[key]
    if not isinstance(text, str) or "${" in text or "://" in text or is_placeholder(text):
        return None
    return local_path(text)


def iterations(folder: FilePath) -> list[int]:
    """The iterations whose checkpoints a folder holds."""
    return sorted(int(found.name[5:]) for found in folder.glob("iter_*") if found.name[5:].isascii() and found.name[5:].isdigit())


def _load_missing(view: View) -> Iterator[Finding]:
    folder, step = _folder(view, LOAD), view[STEP]
    if folder is None or not view.users(LOAD) or (view[LOAD] == view[SAVE] and step is None):  # a first run has nothing there yet
        return
    if not folder.is_dir():
        yield Finding(path(LOAD), f"checkpoint folder {view[LOAD]} does not exist", "check the path, or remove it to start afresh")
    elif step is not None and not (folder / f"iter_{step:07d}").is_dir():
        yield Finding(path(STEP if view.is_users(STEP) else LOAD), f"{view[LOAD]} has no checkpoint of iteration {step}", f"it has: {', '.join(map(str, iterations(folder))) or 'none'}")
    elif view.trainer.OWN:
        yield from _nothing_to_train(view, folder, iterations(folder), step)
    elif not any((folder / name).exists() for name in ("latest_train_state.pt", "latest_checkpointed_iteration.txt")):
        have = iterations(folder)
        hint = f"name it with checkpoint.load, and checkpoint.ckpt_step one of {', '.join(map(str, have))}" if have else "name the folder that holds the iter_ folders"
        yield Finding(path(LOAD), f"{view[LOAD]} has no tracker file (latest_train_state.pt), so upstream takes it for no checkpoint at all", hint)


def _nothing_to_train(view: View, folder: FilePath, have: list[int], step: int | None) -> Iterator[Finding]:
    if not have:
        of_one = re.fullmatch(r"iter_0*(\d+)", folder.name)
        hint = f"name {folder.parent}, and {STEP} {of_one[1]}" if of_one else "name the folder that holds the iter_ folders"
        yield Finding(path(LOAD), f"{view[LOAD]} holds no iter_ folder, and so no checkpoint to resume from", hint)
    elif (begins := step or have[-1]) >= view[ITERS] and view[LOAD] != view[SAVE]:
        yield Finding(
            path(LOAD), f"{view[LOAD]} goes on after iteration {begins}, but {ITERS} is {view[ITERS]}: nothing would be trained",
            f"a larger {ITERS}" + (f", or {STEP} {', '.join(str(n) for n in have if n < view[ITERS])}" if have[0] < view[ITERS] else ""),
        )  # fmt: skip


_MOST_FOLDERS = 5000


def _foreign(view: View) -> Iterator[Finding]:
    folder, keep = _folder(view, SAVE), view[KEEP]
    if folder is None or not view.users(SAVE) or keep is None or keep < 1:
        return
    below = [FilePath(place) / name for place, folders, files in islice(os.walk(folder), _MOST_FOLDERS) for name in folders + files if name.startswith("iter_")]
    if odd := [found for found in below if not (found.name[5:].isascii() and found.name[5:].isdigit())]:
        yield Finding(path(KEEP), f"{KEEP} {keep} sorts all iter_* below {view[SAVE]} by number, and {min(odd)} has none", f"rename it, or give {SAVE} a folder of its own")
    elif others := [found for found in below if found.parent != folder]:
        yield Finding(
            path(KEEP), f"{KEEP} {keep} removes all but the newest {keep} of the iter_* anywhere below {view[SAVE]}: {len(others)} of them belong to others (first: {min(others)})",
            f"give {SAVE} a folder of its own, such as {view[SAVE].rstrip('/')}/{view.resolved.spec.name}; or set {KEEP} to -1",
        )  # fmt: skip


def _resumes_unasked(view: View) -> Iterator[Finding]:
    folder, iters = _folder(view, LOAD), view[ITERS]
    if folder is None or not folder.is_dir() or view[LOAD] != view[SAVE] or iters is None:
        return
    tracker = folder / "latest_checkpointed_iteration.txt"
    try:
        at = int(tracker.read_text().strip())
    except (OSError, ValueError):
        return
    if at >= iters:
        yield Finding(path(LOAD), f"{view[LOAD]} is at iteration {at} already, and the run ends at {iters}: nothing would be trained", f"train.train_iters above {at}, or a new folder")


def _run_config(view: View) -> dict[str, Any] | None:
    """What the checkpoint to be loaded says of its own configuration."""
    folder = _folder(view, LOAD)
    if folder is None or not folder.is_dir():
        return None
    step = view[STEP] if view[STEP] is not None else max(iterations(folder), default=None)
    file = folder / f"iter_{step:07d}" / "run_config.yaml" if step is not None else None
    if file is None or not file.is_file():
        return None
    text = "\n".join(line.split(" !!")[0] if " !!" in line else line for line in file.read_text(errors="replace").splitlines())
    data = parse_document(text.encode(), str(file)).data
    return data if isinstance(data, dict) else None


_ARCHITECTURE = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "kv_channels", "crossattn_emb_size", "max_img_h", "max_img_w",
                 "max_frames", "patch_spatial", "num_joint_layers", "num_single_layers", "guidance_embed")  # fmt: skip


def _other_model(view: View) -> Iterator[Finding]:
    saved = (_run_config(view) or {}).get("model")
    if not isinstance(saved, dict):
        return
    for name in _ARCHITECTURE:
        key = f"model.{name}"
        if key in view.resolved.values and isinstance(saved.get(name), int) and saved[name] != view[key]:
            theirs = shown(saved[name])
            yield Finding(path(key if view.is_users(key) else LOAD), f"{key} is {shown(view[key])}, and the checkpoint's is {theirs}", f"set {key} to {theirs}, or load another checkpoint")


def _other_layout(view: View) -> Iterator[Finding]:
    config = _run_config(view) or {}
    model, checkpoint = config.get("model"), config.get("checkpoint")
    if not isinstance(model, dict) or not view["checkpoint.load_optim"] or view["checkpoint.finetune"] or not view["optimizer.use_distributed_optimizer"]:
        return
    if isinstance(checkpoint, dict) and checkpoint.get("dist_ckpt_optim_fully_reshardable"):
        return
    for key in (TP, PP):
        before = model.get(key.split(".")[1])
        if isinstance(before, int) and before != view[key]:
            yield Finding(path(key), f"{key} is {view[key]}, and the checkpoint's optimizer state was saved for {before}", "keep the layout, or set checkpoint.load_optim to false")


_CONFIG = "Megatron-Bridge training/config.py, CheckpointConfig.finalize"
_CK = "Megatron-Bridge training/checkpointing.py"

RULES = (
    Rule(
        "CKP102", "save-interval-beyond-the-end", WARNING, _save_interval,
        "Nothing is saved until the end, or at all, in silence: any interruption loses the whole run.", "Megatron-Bridge training/train.py, pretrain.py",
    ),
    Rule(
        "CKP103", "resume-past-the-end", ERROR,
        excludes(lambda v: v[ITERS] is not None and (v[STEP] or 0) >= v[ITERS], at=STEP,
                 message=lambda v: f"checkpoint.ckpt_step {v[STEP]} is not before the last iteration {v[ITERS]}: nothing would be trained", hint="raise train.train_iters"),
        "Accepted; the run would end at once, and look like a success.", "Megatron-Bridge training/pretrain.py",
    ),
    Rule(
        "CKP104", "checkpoint-missing", ERROR, _load_missing,
        "Upstream takes a folder without a tracker for no checkpoint, and starts from iteration 0 in silence; exit_on_missing_checkpoint is not even read. "
        "dfmspec's trainer stops.", "Megatron-Bridge training/setup.py and utils/checkpoint_utils.py", ALL, "paths",
    ),
    Rule(
        "CKP105", "checkpoint-path-relative", WARNING, _shared,
        "Each node writes its shards into its own working directory: the checkpoint is in pieces, and nobody notices before it is needed.", _CK,
    ),
    Rule(
        "CKP106", "resume-step-without-folder", ERROR,
        excludes(lambda v: v[STEP] is not None and v.resolved.spec.origins[LOAD].is_users and v.resolved.spec.values[LOAD] is None, at=STEP,
                 message="checkpoint.ckpt_step is set, and checkpoint.load is null", hint="name the folder with checkpoint.load"),
        "A ValueError at start.", _CONFIG,
    ),
    Rule(
        "CKP107", "reshardable-in-two-ways", ERROR,
        requires("checkpoint.dist_ckpt_optim_fully_reshardable", ("checkpoint.distrib_optim_fully_reshardable_mem_efficient", False), because="the two exclude each other"),
        "Asserted at start.", _CONFIG, DFM,
    ),
    Rule(
        "CKP108", "checkpoint-format-unusable", ERROR,
        excludes(lambda v: v["checkpoint.ckpt_format"] not in ("torch_dist", "fsdp_dtensor"), at="checkpoint.ckpt_format",
                 message=lambda v: f"checkpoint.ckpt_format {v['checkpoint.ckpt_format']} cannot be saved or loaded at this revision", hint="torch_dist; fsdp_dtensor with Megatron FSDP"),
        "Accepted at start; the first save fails, hours into the run.", _CK, DFM,
    ),
    Rule(
        "CKP109", "async-save-impossible", ERROR,
        requires("checkpoint.async_save", ("checkpoint.use_persistent_ckpt_worker", True), ("checkpoint.ckpt_format", "torch_dist"), because="asynchronous saves are made for it alone"),
        "Asserted at start.", _CONFIG, DFM,
    ),
    Rule(
        "CKP110", "main-parameters-with-optimizer", ERROR,
        requires("checkpoint.load_main_params_from_ckpt", ("checkpoint.load_optim", False), because="the optimizer's state holds the main parameters too"),
        "Asserted at start.", _CONFIG, DFM,
    ),
    Rule(
        "CKP111", "keeps-nothing", ERROR,
        excludes(lambda v: v[KEEP] is not None and (v[KEEP] == 0 or v[KEEP] < -1), at=KEEP,
                 message=lambda v: f"checkpoint.most_recent_k {v[KEEP]} keeps everything, by an accident of slicing", hint="-1 for all, or 1 or more"),
        "No checkpoint is ever removed, in silence, and the disk fills.", _CK, DFM,
    ),
    Rule(
        "CKP121", "retention-beyond-the-run", ERROR, _foreign,
        "After each save upstream searches the folder to any depth and removes what is older, in silence: checkpoints of other runs are lost. A name without a number is a ValueError at the first save.",
        f"{_CK}, cleanup_old_non_persistent_checkpoint", DFM, "paths",
    ),
    Rule(
        "CKP112", "non-persistent-checkpoints-unusable", ERROR,
        excludes(lambda v: v["checkpoint.non_persistent_ckpt_type"] not in (None, "global"), at="checkpoint.non_persistent_ckpt_type",
                 message=lambda v: f"checkpoint.non_persistent_ckpt_type {v['checkpoint.non_persistent_ckpt_type']} needs a package that DFM does not install, or is not known", hint="null, or global"),
        "Accepted at start; fails when the manager is made or at the first save.", _CK, DFM,
    ),
    Rule(
        "CKP113", "checkpoint-budget", WARNING, _budget,
        "The disk fills in the middle of the run, and the save that fails may be the last one.", "14 bytes a parameter: bf16 weights, fp32 main weights, two moments", ALL, "paths",
    ),
    Rule("CKP114", "checkpoint-folder-not-writable", ERROR, _writable, "The first save fails, hours into the run.", "the file system", ALL, "paths"),
    Rule("CKP115", "run-already-complete", ERROR, _resumes_unasked, "Upstream resumes from checkpoint.load by itself: the run ends at once, as a success.", _CK, DFM, "paths"),
    Rule("CKP116", "checkpoint-of-another-model", ERROR, _other_model, "Shapes do not match when the checkpoint is loaded, after the model is built.", _CK, DFM, "paths"),
    Rule("CKP117", "optimizer-state-of-another-layout", ERROR, _other_layout, "A RuntimeError when the checkpoint is loaded: the state is not reshardable by default.", _CK, DFM, "paths"),
    Rule(
        "CKP118", "finetune-over-its-source", WARNING,
        excludes(lambda v: v["checkpoint.finetune"] and v[SAVE] == v[LOAD], at="checkpoint.finetune",
                 message="finetune starts at iteration 0 and saves into the folder that it loads from, and starts at 0 again after each interruption",
                 hint="set checkpoint.save to another folder; pretrained_checkpoint alone turns finetune on when nothing is saved yet"),
        "The checkpoints that it started from are overwritten one by one, in silence.", _CK, DFM,
    ),
    Rule(
        "CKP119", "structure-assumed-constant", HINT,
        excludes(lambda v: v["checkpoint.ckpt_assume_constant_structure"] and v["train.rampup_batch_size"] is not None, at="checkpoint.ckpt_assume_constant_structure",
                 message="ckpt_assume_constant_structure with a batch size that ramps up: what is saved may change", hint="set it to false"),
        "The plan of the first save is used for all.", _CK, DFM,
    ),
    Rule(
        "CKP120", "pretrained-checkpoint-missing", ERROR,
        excludes(lambda v: (folder := _folder(v, "checkpoint.pretrained_checkpoint")) is not None and not folder.exists(), at="checkpoint.pretrained_checkpoint",
                 message=lambda v: f"checkpoint.pretrained_checkpoint {v['checkpoint.pretrained_checkpoint']} does not exist", hint="check the path"),
        "The run fails after the model is built.", _CK, ALL, "paths",
    ),
)  # fmt: skip
