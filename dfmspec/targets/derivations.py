"""Values that every target derives alike."""

from __future__ import annotations

import math

from dfmspec.diagnostics import Severity
from dfmspec.targets import Derived, Values, round_float
from dfmspec.targets.layout import LAYOUT_KEYS, layout_of


def _nproc(values: Values) -> int:
    nnodes: int = values["cluster.nnodes"]
    model_parallel: int = math.prod(values[key] for key in LAYOUT_KEYS[2:])
    return -(-model_parallel // nnodes)


def data_parallel_size(values: Values) -> int:
    """DP, at least 1: a world size that does not divide is a finding of its own."""
    return max(1, layout_of(values).data_parallel_size)


SHARED: tuple[Derived, ...] = (
    Derived("cluster.nproc_per_node", (LAYOUT_KEYS[0], *LAYOUT_KEYS[2:]), _nproc, "the fewest that hold TP x PP x CP"),
    Derived("model.ffn_hidden_size", ("model.hidden_size",), lambda v: 4 * v["model.hidden_size"], "4 x hidden_size"),
    Derived(
        "model.kv_channels", ("model.hidden_size", "model.num_attention_heads"),
        lambda v: v["model.hidden_size"] // v["model.num_attention_heads"], "hidden_size / num_attention_heads", Severity.HINT,
    ),
    Derived("model.num_query_groups", ("model.num_attention_heads",), lambda v: v["model.num_attention_heads"], "num_attention_heads"),
    Derived(
        "train.global_batch_size", ("train.micro_batch_size", *LAYOUT_KEYS),
        lambda v: v["train.micro_batch_size"] * data_parallel_size(v), "micro_batch_size x the data-parallel size",
    ),
    Derived(
        "dataset.micro_batch_size", ("train.micro_batch_size",), lambda v: v["train.micro_batch_size"],
        "train.micro_batch_size", Severity.ERROR, alone=True,
    ),
    Derived(
        "dataset.global_batch_size", ("train.global_batch_size",), lambda v: v["train.global_batch_size"],
        "train.global_batch_size", Severity.ERROR, alone=True,
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
        "optimizer.use_distributed_optimizer", Severity.ERROR, alone=True,
    ),
    Derived("checkpoint.save", (), lambda v: "${RUN_DIR}/checkpoints", "the run directory"),
    Derived("checkpoint.load", ("checkpoint.save",), lambda v: v["checkpoint.save"], "checkpoint.save"),
    Derived("logger.tensorboard_dir", (), lambda v: "${RUN_DIR}/tensorboard", "the run directory"),
)  # fmt: skip
"""What both targets derive alike."""
