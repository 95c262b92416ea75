"""BAT, SEQ, OPT, DDP, EVL, CKP (spec): batches, lengths, the schedule, and derived values that no longer fit."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.diagnostics import Finding, Severity
from dfmspec.layout import nearest_multiples
from dfmspec.rules.base import DFM, OURS, Rule, View, excludes, path
from dfmspec.targets import target_module

GBS, MBS = "train.global_batch_size", "train.micro_batch_size"
LENGTH = "dataset.task_encoder_seq_length"


def _global_batch(view: View) -> Iterator[Finding]:
    gbs, mbs, dp = view[GBS], view[MBS], view.data_parallel_size
    if gbs % (mbs * dp):
        near = " or ".join(map(str, nearest_multiples(gbs, mbs * dp)))
        yield Finding(
            path(GBS if view.is_users(GBS) else MBS),
            f"{GBS} {gbs} is not a multiple of micro_batch_size {mbs} x data-parallel size {dp} = {mbs * dp}",
            f"{GBS} {near}; the data-parallel size is {view.layout.world_size} processes / {view.layout.model_parallel_size}",
        )


def _stale_derived(view: View) -> Iterator[Finding]:
    for derivation in target_module(view.resolved.spec.target).DERIVED:
        key = derivation.key
        if derivation.differing is None or key not in view.resolved.derived or not view.is_users(key):
            continue
        users = [source for source in derivation.sources if view.is_users(source)]
        value, expected = view[key], view.resolved.derived[key]
        twin_alone = derivation.differing is Severity.ERROR and "weight_decay" not in key  # nothing legal can mean it
        if (users or twin_alone) and value != expected:
            yield Finding(
                path(key), f"{key} is {value}, but {', '.join(users or derivation.sources)} makes it {expected} ({derivation.formula})",
                f"remove {key} to have it derived", derivation.differing,
            )  # fmt: skip


def _sequence_over_tp(view: View) -> Iterator[Finding]:
    tp, length = view["model.tensor_model_parallel_size"], view[LENGTH]
    if view["model.sequence_parallel"] and length % tp:
        yield Finding(
            path(LENGTH), f"sequence parallelism cuts a pack's {length} tokens over TP {tp}, which does not divide them",
            f"{LENGTH} {' or '.join(map(str, nearest_multiples(length, tp)))}",
        )  # fmt: skip


def _warmup(view: View) -> Iterator[Finding]:
    warmup, decay = view["scheduler.lr_warmup_iters"], view["scheduler.lr_decay_iters"]
    if warmup >= decay:
        yield Finding(
            path("scheduler.lr_warmup_iters"), f"the warm-up ({warmup} iterations) is not shorter than the decay ({decay})",
            f"at most {decay - 1}" if decay > 1 else "set it to 0",
        )  # fmt: skip


def _streams(view: View) -> Iterator[Finding]:
    streams, dp = view["data.num_streams"], view.data_parallel_size
    if streams % dp:
        yield Finding(
            path("data.num_streams"), f"data.num_streams {streams} is not a multiple of the data-parallel size {dp}",
            f"{' or '.join(map(str, nearest_multiples(streams, dp)))}; a rank owns whole streams",
        )  # fmt: skip


def _save_interval(view: View) -> Iterator[Finding]:
    interval, iters = view["checkpoint.save_interval"], view["train.train_iters"]
    if interval > iters and view.is_users("checkpoint.save_interval"):
        yield Finding(
            path("checkpoint.save_interval"), f"save_interval {interval} is longer than the run's {iters} iterations",
            "only the last iteration is saved; a run that is killed before starts over",
        )  # fmt: skip


RULES = (
    Rule(
        "BAT101", "global-batch-not-divisible", Severity.ERROR, _global_batch,
        "An iteration is a whole number of microbatches on every data-parallel rank.",
        ("cluster.nproc_per_node=4", f"{GBS}=10"), ("cluster.nproc_per_node=4", f"{GBS}=12"),
    ),
    Rule(
        "BAT102", "micro-batch-with-packing", Severity.ERROR,
        excludes(lambda v: v[MBS] != 1 and v["dataset.packing_buffer_size"] is not None, at=MBS,
                 message="DFM packs samples itself: with micro_batch_size above 1 it keeps one pack of each microbatch and drops the rest in silence",
                 hint="set train.micro_batch_size to 1; a pack's size is dataset.task_encoder_seq_length"),
        "The effective batch is smaller than asked for, and nothing says so.",
        (f"{MBS}=2",), (f"{MBS}=1",), DFM,
    ),
    Rule(
        "SPC301", "stale-derived-value", Severity.WARNING, _stale_derived,
        "A value that follows from another was set to something else; one of the two is not what was meant.",
        ("train.train_iters=500", "scheduler.lr_decay_iters=10000"), ("train.train_iters=500",),
    ),
    Rule(
        "SEQ101", "sequence-not-divisible", Severity.ERROR, _sequence_over_tp,
        "Sequence parallelism gives each tensor-parallel rank an equal share of the tokens.",
        ("cluster.nproc_per_node=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true", f"{LENGTH}=4097"),
        ("cluster.nproc_per_node=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true", f"{LENGTH}=4096"),
    ),
    Rule(
        "OPT101", "min-lr-above-lr", Severity.ERROR,
        excludes(lambda v: v["optimizer.min_lr"] > v["optimizer.lr"], at="optimizer.min_lr",
                 message="optimizer.min_lr is above optimizer.lr, so the decay would be a rise",
                 hint="remove optimizer.min_lr to have a tenth of lr"),
        "megatron-core asserts it when the scheduler is built.",
        ("optimizer.lr=1e-5", "optimizer.min_lr=1e-4"), ("optimizer.lr=1e-3", "optimizer.min_lr=1e-4"),
    ),
    Rule(
        "OPT102", "warmup-not-shorter-than-decay", Severity.ERROR, _warmup,
        "megatron-core asserts it when the scheduler is built.",
        ("train.train_iters=100", "scheduler.lr_warmup_iters=100"), ("train.train_iters=100", "scheduler.lr_warmup_iters=99"),
    ),
    Rule(
        "OPT103", "weight-decay-overwritten", Severity.WARNING,
        excludes(lambda v: v.is_users("optimizer.weight_decay"), at="optimizer.weight_decay",
                 message="DFM's scheduler overwrites optimizer.weight_decay with its own start_weight_decay (0.033) in the first iteration",
                 hint="the plan sets scheduler.start_weight_decay and end_weight_decay to it; write those to be silent"),
        "Without the derived twins the value has no effect upstream.",
        ("optimizer.weight_decay=0.01",), ("scheduler.start_weight_decay=0.01", "scheduler.end_weight_decay=0.01"), DFM,
    ),
    Rule(
        "DDP101", "param-gather-without-grad-overlap", Severity.ERROR,
        excludes(lambda v: v["ddp.overlap_param_gather"] and not v["ddp.overlap_grad_reduce"], at="ddp.overlap_param_gather",
                 message="overlap_param_gather needs overlap_grad_reduce", hint="set ddp.overlap_grad_reduce to true too"),
        "megatron-core asserts it when the model is wrapped.",
        ("ddp.overlap_param_gather=true",), ("ddp.overlap_param_gather=true", "ddp.overlap_grad_reduce=true"),
    ),
    Rule(
        "DDP102", "param-gather-without-distributed-optimizer", Severity.ERROR,
        excludes(lambda v: v["ddp.overlap_param_gather"] and not v["ddp.use_distributed_optimizer"], at="ddp.overlap_param_gather",
                 message="overlap_param_gather gathers what the distributed optimizer sharded, and that is off",
                 hint="set optimizer.use_distributed_optimizer to true"),
        "megatron-core asserts it when the model is wrapped.",
        ("ddp.overlap_param_gather=true", "ddp.overlap_grad_reduce=true", "optimizer.use_distributed_optimizer=false"),
        ("ddp.overlap_param_gather=true", "ddp.overlap_grad_reduce=true"),
    ),
    Rule(
        "DAT106", "streams-not-divisible", Severity.ERROR, _streams,
        "A sample stream belongs to one data-parallel rank; that is what lets DP change between attempts.",
        ("cluster.nproc_per_node=4", "data.num_streams=6"), ("cluster.nproc_per_node=4", "data.num_streams=8"), OURS,
    ),
    Rule(
        "CKP102", "save-interval-beyond-the-end", Severity.WARNING, _save_interval,
        "Nothing is saved until the end, so any interruption loses the whole run.",
        ("train.train_iters=100", "checkpoint.save_interval=500"), ("train.train_iters=100", "checkpoint.save_interval=50"),
    ),
    Rule(
        "CKP103", "resume-past-the-end", Severity.ERROR,
        excludes(lambda v: (v["checkpoint.ckpt_step"] or 0) >= v["train.train_iters"], at="checkpoint.ckpt_step",
                 message="checkpoint.ckpt_step is not before the last iteration: nothing would be trained",
                 hint="raise train.train_iters"),
        "The run would end at once, and look like a success.",
        ("checkpoint.ckpt_step=10000",), ("checkpoint.ckpt_step=5000",),
    ),
    Rule(
        "EVL101", "evaluation-never-due", Severity.HINT,
        excludes(lambda v: bool(v["train.eval_iters"]) and v.is_users("train.eval_interval") and v["train.eval_interval"] > v["train.train_iters"],
                 at="train.eval_interval", message="train.eval_interval is longer than the run: only the last iteration is evaluated",
                 hint="lower it, or set train.eval_iters to 0"),
        "The evaluation curve would have one point.",
        ("train.train_iters=100", "train.eval_interval=500"), ("train.train_iters=100", "train.eval_interval=50"),
    ),
)  # fmt: skip
