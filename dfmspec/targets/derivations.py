"""Values that every target derives alike."""

from __future__ import annotations

import math
from typing import Any

from dfmspec.diagnostics import Severity
from dfmspec.spec.paths import RUN_DIR
from dfmspec.targets import Derived, Values, round_float
from dfmspec.targets.layout import LAYOUT_KEYS, MODEL_PARALLEL_KEYS, layout_of


def copied(key: str, source: str, *, differing: Severity | None = None, alone: bool = False) -> Derived:
    """A key whose value is another key's."""
    return Derived(
        key=key,
        sources=(source,),
        value=lambda v: v[source],
        formula=source,
        differing=differing,
        alone=alone,
    )


def fixed(key: str, value: Any, formula: str) -> Derived:
    """A key whose value no other key changes."""
    return Derived(
        key=key,
        sources=(),
        value=lambda v: value,
        formula=formula,
    )


def data_parallel_size(values: Values) -> int:
    """DP, at least 1: a world size that does not divide is a finding of its own."""
    return max(1, layout_of(values).data_parallel_size)


def _nproc(values: Values) -> int:
    """The fewest processes on each node that together hold one copy of the model."""
    nnodes: int = values["cluster.nnodes"]
    model_parallel: int = math.prod(values[key] for key in MODEL_PARALLEL_KEYS)
    # Rounded up.
    return -(-model_parallel // nnodes)


def _kv_channels(values: Values) -> Any:
    return values["model.hidden_size"] // values["model.num_attention_heads"]


def _global_batch_size(values: Values) -> Any:
    """One microbatch a step on each replica: no accumulation of gradients."""
    return values["train.micro_batch_size"] * data_parallel_size(values)


def warmup_iterations(values: Values) -> int:
    """A twentieth of the training, and 2,000 iterations at most."""
    twentieth: int = values["train.train_iters"] // 20
    return min(2000, twentieth)


SHARED: tuple[Derived, ...] = (
    # Ranks.
    Derived(
        key="cluster.nproc_per_node",
        sources=("cluster.nnodes", *MODEL_PARALLEL_KEYS),
        value=_nproc,
        formula="the fewest that hold TP x PP x CP",
    ),
    # The network.
    Derived(
        key="model.ffn_hidden_size",
        sources=("model.hidden_size",),
        value=lambda v: 4 * v["model.hidden_size"],
        formula="4 x hidden_size",
    ),
    Derived(
        key="model.kv_channels",
        sources=("model.hidden_size", "model.num_attention_heads"),
        value=_kv_channels,
        formula="hidden_size / num_attention_heads",
        differing=Severity.HINT,
    ),
    Derived(
        key="model.num_query_groups",
        sources=("model.num_attention_heads",),
        value=lambda v: v["model.num_attention_heads"],
        formula="num_attention_heads",
    ),
    # Batches. The dataset's copies are what the loader cuts by: others than training's are an error.
    Derived(
        key="train.global_batch_size",
        sources=("train.micro_batch_size", *LAYOUT_KEYS),
        value=_global_batch_size,
        formula="micro_batch_size x the data-parallel size",
    ),
    copied(
        "dataset.micro_batch_size",
        "train.micro_batch_size",
        differing=Severity.ERROR,
        alone=True,
    ),
    copied(
        "dataset.global_batch_size",
        "train.global_batch_size",
        differing=Severity.ERROR,
        alone=True,
    ),
    # The optimizer and its schedules. A weight decay that starts or ends elsewhere would be a ramp.
    Derived(
        key="optimizer.min_lr",
        sources=("optimizer.lr",),
        value=lambda v: round_float(0.1 * v["optimizer.lr"]),
        formula="0.1 x optimizer.lr",
    ),
    copied("scheduler.lr_decay_iters", "train.train_iters", differing=Severity.WARNING),
    Derived(
        key="scheduler.lr_warmup_iters",
        sources=("train.train_iters",),
        value=warmup_iterations,
        formula="min(2000, 5 % of train.train_iters)",
    ),
    copied("scheduler.start_weight_decay", "optimizer.weight_decay", differing=Severity.ERROR),
    copied("scheduler.end_weight_decay", "optimizer.weight_decay", differing=Severity.ERROR),
    # DDP has a copy of the key by which the optimizer is built, and the two must say one thing.
    copied(
        "ddp.use_distributed_optimizer",
        "optimizer.use_distributed_optimizer",
        differing=Severity.ERROR,
        alone=True,
    ),
    # What a run writes lies in its own directory, whose path is known at launch.
    fixed("checkpoint.save", f"{RUN_DIR}/checkpoints", "the run directory"),
    copied("checkpoint.load", "checkpoint.save"),
    fixed("logger.tensorboard_dir", f"{RUN_DIR}/tensorboard", "the run directory"),
)
"""What every target derives alike."""
