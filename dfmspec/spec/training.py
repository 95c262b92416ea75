"""`train optimizer scheduler ddp mixed_precision rng dist`: the training loop, under Megatron-Bridge's names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfmspec.spec.base import Count, Fraction, NonNegative, NonNegativeInt, Positive, Section, derived


class Train(Section):
    """Batch sizes, length of the run, evaluation."""

    micro_batch_size: Count = 1
    """Packed sequences of one microbatch, concatenated into one THD sequence."""
    global_batch_size: Count = derived()
    """Packed sequences of one iteration, over all ranks; derived: micro_batch_size x the data-parallel size."""
    train_iters: Count = 10000
    """Iterations (optimizer steps) of the run."""
    eval_interval: Count = 1000
    """Iterations between evaluations."""
    eval_iters: NonNegativeInt = 32
    """Global batches in one evaluation; 0: never evaluate."""


class Optimizer(Section):
    """Adam, as megatron-core's optimizer takes it."""

    optimizer: Literal["adam"] = "adam"
    """The optimizer; Adam with decoupled weight decay."""
    lr: Positive = 9e-5
    """Peak learning rate."""
    min_lr: NonNegative = derived()
    """Learning rate at the end of the decay; derived: 0.1 x lr."""
    weight_decay: NonNegative = 0.033
    """Decoupled weight decay of matrices; biases and norms have none."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.95
    """Decay of the second moment."""
    adam_eps: Positive = 1e-5
    """Added to the root of the second moment."""
    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0: no clipping."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""


class Scheduler(Section):
    """Learning rate and weight decay over the iterations."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from lr to min_lr."""
    lr_decay_iters: Count = derived()
    """Iteration at which min_lr is reached; derived: train.train_iters."""
    lr_warmup_iters: NonNegativeInt = derived()
    """Iterations of linear warm-up; derived: min(2000, 5 % of train.train_iters)."""
    lr_warmup_init: NonNegative = 0.0
    """Learning rate at the start of the warm-up."""
    start_weight_decay: NonNegative = derived()
    """Weight decay at the start; derived: optimizer.weight_decay."""
    end_weight_decay: NonNegative = derived()
    """Weight decay at the end; derived: optimizer.weight_decay."""


class Ddp(Section):
    """megatron-core's DistributedDataParallel."""

    use_distributed_optimizer: bool = derived()
    """Reduce-scatter gradients; derived: optimizer.use_distributed_optimizer."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    (
        "Gather updated parameters in buckets; "
        "they are waited for at once, because averages, evaluations and checkpoints read them."
    )
    grad_reduce_in_fp32: bool = True
    """Sum gradients in fp32."""
    bucket_size: Count | None = None
    """Parameters in one gradient bucket; null: megatron-core's choice."""
    check_for_nan_in_grad: bool = False
    (
        "Name the rank whose gradient is not finite, for a pass over all gradients and a wait; "
        "one that is not finite stops the run in any case."
    )


class MixedPrecision(Section):
    """Precision of weights and activations; the noise, sigma and the loss are fp32 in any case."""

    bf16: bool = derived()
    """bf16 weights and activations with fp32 main parameters; derived: true on cuda, false on cpu."""
    fp8: Literal["hybrid"] | None = None
    """hybrid: the matrix products of the blocks in FP8 on a GPU, E4M3 forward and E5M2 for gradients; null: in bf16."""
    fp8_recipe: Literal["tensorwise"] = "tensorwise"
    """tensorwise: current scaling, each tensor by its own largest value."""


class Rng(Section):
    """Random numbers."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1234
    """Seed of the weights, of the noise (with stream and ordinal of the sample) and of the order of the data."""


class Dist(Section):
    """torch.distributed."""

    distributed_timeout_minutes: Count = 10
    """Minutes after which a collective that does not finish stops the run."""
