"""Target megatron_core: dfmspec's own trainer (dfmspec/trainer) on megatron-core 0.16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dfmspec.diagnostics import Severity
from dfmspec.targets import CONFIG, Derived, Values, round_float
from dfmspec.targets.layout import Layout

ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"
_LAYOUT = (
    "cluster.nnodes", "cluster.nproc_per_node", "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
)  # fmt: skip
_NOT_THE_SCRIPTS = ("spec_version", "target", "launcher.", "run.", "cluster.nnodes", "cluster.nproc_per_node", "cluster.master_")


def layout(values: Values) -> Layout:
    """The arrangement of ranks."""
    nnodes, nproc, tp, pp, cp = (values[key] for key in _LAYOUT)
    return Layout(nnodes * nproc, tp, pp, cp)


def _nproc(values: Values) -> int:
    nnodes: int = values["cluster.nnodes"]
    model_parallel: int = math.prod(values[key] for key in _LAYOUT[2:])
    return -(-model_parallel // nnodes)


def _data_parallel(values: Values) -> int:
    return max(1, layout(values).data_parallel_size)


SHARED: tuple[Derived, ...] = (
    Derived("cluster.nproc_per_node", (_LAYOUT[0], *_LAYOUT[2:]), _nproc, "the fewest that hold TP x PP x CP"),
    Derived("model.ffn_hidden_size", ("model.hidden_size",), lambda v: 4 * v["model.hidden_size"], "4 x hidden_size"),
    Derived(
        "model.kv_channels", ("model.hidden_size", "model.num_attention_heads"),
        lambda v: v["model.hidden_size"] // v["model.num_attention_heads"], "hidden_size / num_attention_heads", Severity.HINT,
    ),
    Derived("model.num_query_groups", ("model.num_attention_heads",), lambda v: v["model.num_attention_heads"], "num_attention_heads"),
    Derived(
        "train.global_batch_size", ("train.micro_batch_size", *_LAYOUT),
        lambda v: v["train.micro_batch_size"] * _data_parallel(v), "micro_batch_size x the data-parallel size",
    ),
    Derived(
        "dataset.micro_batch_size", ("train.micro_batch_size",), lambda v: v["train.micro_batch_size"],
        "train.micro_batch_size", Severity.ERROR,
    ),
    Derived(
        "dataset.global_batch_size", ("train.global_batch_size",), lambda v: v["train.global_batch_size"],
        "train.global_batch_size", Severity.ERROR,
    ),
    Derived("optimizer.min_lr", ("optimizer.lr",), lambda v: round_float(0.1 * v["optimizer.lr"]), "0.1 x optimizer.lr"),
    Derived(
        "scheduler.lr_decay_iters", ("train.train_iters",), lambda v: v["train.train_iters"], "train.train_iters", Severity.WARNING
    ),
    Derived(
        "scheduler.lr_warmup_iters", ("train.train_iters",), lambda v: min(2000, v["train.train_iters"] // 20),
        "min(2000, 5 % of train.train_iters)",
    ),
    Derived(
        "scheduler.start_weight_decay", ("optimizer.weight_decay",), lambda v: v["optimizer.weight_decay"],
        "optimizer.weight_decay", Severity.ERROR,
    ),
    Derived(
        "scheduler.end_weight_decay", ("optimizer.weight_decay",), lambda v: v["optimizer.weight_decay"],
        "optimizer.weight_decay", Severity.ERROR,
    ),
    Derived(
        "ddp.use_distributed_optimizer", ("optimizer.use_distributed_optimizer",), lambda v: v["optimizer.use_distributed_optimizer"],
        "optimizer.use_distributed_optimizer", Severity.ERROR,
    ),
    Derived("checkpoint.save", (), lambda v: "${RUN_DIR}/checkpoints", "the run directory"),
    Derived("checkpoint.load", ("checkpoint.save",), lambda v: v["checkpoint.save"], "checkpoint.save"),
    Derived("logger.tensorboard_dir", (), lambda v: "${RUN_DIR}/tensorboard", "the run directory"),
)  # fmt: skip
"""What both targets derive alike."""


def _packing_buffer(values: Values) -> int:
    if values["data.source"] != "embedded":
        return _BUFFER
    in_a_pack: int = max(1, values["dataset.task_encoder_seq_length"] // (values["data.resolution"] // 8 // values["model.patch_spatial"]) ** 2)
    return -(-_BUFFER // in_a_pack) * in_a_pack


_BUFFER = 40
"""DFM's own."""


def _embedded_path(values: Values) -> str | None:
    if values["data.source"] != "embedded":
        return None
    return f"data/butterflies-{values['data.resolution']}px-{values['data.num_samples']}-seed{values['data.seed']}"


DERIVED: tuple[Derived, ...] = (
    *SHARED,
    Derived("model.seq_length", ("dataset.task_encoder_seq_length",), lambda v: v["dataset.task_encoder_seq_length"],
            "dataset.task_encoder_seq_length", Severity.ERROR),
    Derived("model.transformer_impl", ("cluster.device",),
            lambda v: "local" if v["cluster.device"] == "cpu" else "transformer_engine", "cluster.device"),
    Derived("mixed_precision.bf16", ("cluster.device",), lambda v: v["cluster.device"] == "cuda", "cluster.device"),
    Derived("data.num_streams", ("dataset.num_workers", *_LAYOUT),
            lambda v: _data_parallel(v) * max(1, v["dataset.num_workers"]), "the data-parallel size x max(1, num_workers)"),
    Derived("dataset.packing_buffer_size", ("data.source", "data.resolution", "model.patch_spatial", "dataset.task_encoder_seq_length"), _packing_buffer,
            "40, or as many more as make whole packs"),
    Derived("dataset.path", ("data.source", "data.resolution", "data.num_samples", "data.seed"), _embedded_path, "the embedded data"),
)  # fmt: skip


def config(values: Values) -> dict[str, Any]:
    """The whole configuration: the trainer fills in nothing."""
    nested: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        section, dot, field = key.rpartition(".")
        if key in ("extends", "config_file") or key.startswith(("launcher.", "run.")):  # the launcher's business
            continue
        if dot:
            nested.setdefault(section, {})[field] = value
        else:
            nested[key] = value
    return nested


def read_back(values: Values, text: str) -> None:
    """By the loader that made it."""
    return


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """`--dataset-path P` when a spec sets nothing else that the script must know; else the config file."""
    told = {key for key, origin in origins.items() if origin.is_users and not key.startswith(_NOT_THE_SCRIPTS)}
    resumes_from = values["run.resume"] not in ("auto", "require", "never")  # written into the config file at launch
    return ["--dataset-path", values["dataset.path"]] if told == {"dataset.path"} and not resumes_from else ["--config-file", CONFIG]
