"""What NVIDIA DFM's script sets between its configuration and the training: copies over sections, and what is null.

Sources: training/config.py, mixed_precision.py and comm_overlap.py (Megatron-Bridge 953aabf7);
TransformerConfig.__post_init__ (megatron-core 2d398b42).
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

from dfmspec.targets.dfm import Refused
from dfmspec.targets.dfm.bridge import BRIDGE_PRECISION, PRECISIONS
from dfmspec.targets.dfm.omegaconf import Tree


def set_up(tree: Tree, world_size: int) -> int:
    """Change a configuration as upstream does before it trains, in its order; the data-parallel size that it sees.

    Raises:
        Refused: the ranks cannot be divided, or a precision has no such name.
    """
    _copy_precision(tree)
    data_parallel_size = _data_parallel_size(tree["model"], world_size)
    overlap = tree["comm_overlap"]
    if isinstance(overlap, dict):
        overlap["data_parallel_size"] = data_parallel_size
        _copy_overlap(tree, overlap, data_parallel_size)
    _post_init(tree["model"])
    _validate(tree)
    return data_parallel_size


def only(tree: Tree, keys: Container[str]) -> Tree:
    """The part of a mapping whose keys are among some."""
    return {key: value for key, value in tree.items() if key in keys}


# Precision and ranks.


def named_precision(name: str) -> Tree:
    """Megatron-Bridge's recipe of that name, whole.

    Raises:
        Refused: there is none.
    """
    key = name.replace("-", "_")
    if key not in PRECISIONS:
        raise Refused(f"unknown mixed-precision recipe {name}")
    named = PRECISIONS[key]
    # What a recipe does not set, but follows from it.
    reduces_in_fp32 = key.startswith("bf16") or "_bf16_" in key
    fp8_param = named.get("fp8_param_gather")
    return BRIDGE_PRECISION | {"grad_reduce_in_fp32": reduces_in_fp32} | named | {"fp8_param": fp8_param}


def _copy_precision(tree: Tree) -> None:
    """Copy the precision over the fields of that name in other sections (MixedPrecisionConfig.setup)."""
    if isinstance(tree["mixed_precision"], str):
        tree["mixed_precision"] = named_precision(tree["mixed_precision"])
    precision = tree["mixed_precision"]
    if not isinstance(precision, dict):
        return
    if precision["fp8_param"] is None:
        precision["fp8_param"] = precision["fp8_param_gather"]
    for section in ("model", "optimizer", "ddp"):
        tree[section].update(only(precision, tree[section]))


def _data_parallel_size(model: Tree, world_size: int) -> int:
    tensor = model["tensor_model_parallel_size"]
    pipeline = model["pipeline_model_parallel_size"]
    context = model["context_parallel_size"]
    # Nothing has checked the types yet.
    try:
        return world_size // (tensor * pipeline * context)  # type: ignore[no-any-return]
    except (TypeError, ZeroDivisionError) as error:
        raise Refused(str(error)) from error


# Overlap of messages and computation.


def _copy_overlap(tree: Tree, overlap: Tree, data_parallel_size: int) -> None:
    """Copy a comm_overlap section, and its own defaults, over other sections (CommOverlapConfig.setup)."""
    model = tree["model"]
    chunks = model["virtual_pipeline_model_parallel_size"] or 1

    # Overlap over TP needs sequences that are split.
    if overlap.get("tp_comm_overlap") is True and _has_whole_sequences(model):
        overlap = overlap | {"tp_comm_overlap": False}

    # The model, always.
    has_stages = model["pipeline_model_parallel_size"] > 1
    of_model = {
        "tp_comm_overlap": False,
        "overlap_p2p_comm": has_stages and chunks > 1,
        "batch_p2p_comm": has_stages and chunks == 1,
        "defer_embedding_wgrad_compute": False,
        "wgrad_deferral_limit": -1,
        "overlap_moe_expert_parallel_comm": False,
        "delay_wgrad_compute": False,
    }
    model.update(_chosen(overlap, of_model))
    if not tree["ddp"]["use_distributed_optimizer"]:
        return

    # Optimizer and DDP, each in the fields that it has.
    has_replicas = data_parallel_size > 1
    shared = {
        "bucket_size": 128 * 2**20 if has_replicas else None,
        "overlap_grad_reduce": has_replicas,
        "overlap_param_gather": has_replicas,
        "overlap_param_gather_with_optimizer_step": False,
        "align_param_gather": has_replicas and has_stages and chunks > 1,
    }
    chosen = _chosen(overlap, shared)
    for section in ("optimizer", "ddp"):
        tree[section].update(only(chosen, tree[section]))


def _has_whole_sequences(model: Tree) -> bool:
    return model["tensor_model_parallel_size"] < 2 or not model["sequence_parallel"]


def _chosen(overlap: Tree, defaults: Tree) -> Tree:
    """The section's own values, and defaults where it has none."""
    chosen = {}
    for key, default in defaults.items():
        own = overlap.get(key)
        chosen[key] = default if own is None else own
    return chosen


# Post-inits: they fill what is null, and keep pairs of keys in step.

_FILLS: dict[str, Callable[[Tree], Any]] = {
    "ffn_hidden_size": lambda model: 4 * model["hidden_size"],
    "kv_channels": lambda model: model["hidden_size"] // model["num_attention_heads"],
    "num_query_groups": lambda model: model["num_attention_heads"],
    "expert_tensor_parallel_size": lambda model: model["tensor_model_parallel_size"],
    "microbatch_group_size_per_vp_stage": lambda model: model["pipeline_model_parallel_size"],
    "autocast_dtype": lambda model: model["params_dtype"],
    "recompute_modules": lambda model: ["core_attn"],
}
"""What TransformerConfig's post-init gives a field that is null."""


def _post_init(model: Tree) -> None:
    """Fill a model's fields as TransformerConfig's second post-init does: what is null, and nothing else."""
    for key, value in _FILLS.items():
        if model.get(key) is None:
            model[key] = value(model)
    if model.get("enable_cuda_graph"):
        model["cuda_graph_impl"] = "local"
    if model.get("external_cuda_graph"):
        model["cuda_graph_impl"] = "transformer_engine"


def _validate(tree: Tree) -> None:
    """Set what ConfigContainer.validate sets."""
    ddp = tree["ddp"]
    optimizer = tree["optimizer"]
    model = tree["model"]
    dist = tree["dist"]

    # The distributed optimizer.
    if ddp["use_distributed_optimizer"] or optimizer["use_distributed_optimizer"]:
        ddp["use_distributed_optimizer"] = True
        optimizer["use_distributed_optimizer"] = True

    # Megatron FSDP, and what it turns off.
    if dist["use_megatron_fsdp"] or ddp["use_megatron_fsdp"]:
        dist["use_megatron_fsdp"] = True
        ddp["use_megatron_fsdp"] = True
        if ddp["average_in_collective"]:
            ddp["average_in_collective"] = False
        if optimizer["use_precision_aware_optimizer"]:
            ddp["preserve_fp32_weights"] = False
        if model["gradient_accumulation_fusion"]:
            model["gradient_accumulation_fusion"] = False

    # Random states and initialization.
    if tree["rng"]["te_rng_tracker"] or model["use_te_rng_tracker"]:
        tree["rng"]["te_rng_tracker"] = True
        model["use_te_rng_tracker"] = True
    model["use_cpu_initialization"] = model["use_cpu_initialization"] or dist["lazy_init"]

    _count_steps(tree["train"], tree["scheduler"])


# The schedule, which upstream counts in samples and calls steps.


def _count_steps(train: Tree, scheduler: Tree) -> None:
    """Set the schedule's own fields, from a training that is given in iterations or in samples."""
    if train["train_samples"] is None:
        steps = _steps_of_iterations(train, scheduler)
    else:
        steps = _steps_of_samples(train, scheduler)
    fraction = scheduler["lr_warmup_fraction"]
    if fraction is not None:
        steps["lr_warmup_steps"] = fraction * steps["lr_decay_steps"]
    # Without a last decay, what a file set there stays.
    if steps["wsd_decay_steps"] is None:
        steps["wsd_decay_steps"] = scheduler.get("wsd_decay_steps")
    scheduler.update(steps)


def _steps_of_samples(train: Tree, scheduler: Tree) -> Tree:
    samples = train["train_samples"]
    train["train_iters"] = samples // train["global_batch_size"]
    if scheduler["lr_decay_samples"] is None:
        scheduler["lr_decay_samples"] = samples
    return {
        "lr_decay_steps": scheduler["lr_decay_samples"],
        "wd_incr_steps": samples,
        "lr_warmup_steps": scheduler["lr_warmup_samples"],
        "wsd_decay_steps": scheduler["lr_wsd_decay_samples"],
    }


def _steps_of_iterations(train: Tree, scheduler: Tree) -> Tree:
    batch = train["global_batch_size"]
    if scheduler["lr_decay_iters"] is None:
        scheduler["lr_decay_iters"] = train["train_iters"]
    steps = {
        "lr_decay_steps": scheduler["lr_decay_iters"] * batch,
        "wd_incr_steps": train["train_iters"] * batch,
        "lr_warmup_steps": scheduler["lr_warmup_iters"] * batch,
        "wsd_decay_steps": None,
    }
    if scheduler["lr_wsd_decay_iters"] is not None:
        steps["wsd_decay_steps"] = scheduler["lr_wsd_decay_iters"] * batch
    return steps
