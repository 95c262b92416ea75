"""BAT: batch sizes and the length of a run."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, ERROR, GBS, HINT, ITERS, MBS, SAMPLES, WARNING, Rule, View, excludes, path
from dfmspec.check.rules.sequence import PACKING
from dfmspec.diagnostics import Edit, Finding
from dfmspec.targets.layout import nearest_multiples

RAMPUP, DECREASE = "train.rampup_batch_size", "train.decrease_batch_size_if_needed"


def _global_batch(view: View) -> Iterator[Finding]:
    gbs, mbs, dp = view[GBS], view[MBS], view.data_parallel_size
    if gbs % (mbs * dp):
        near = " or ".join(map(str, nearest_multiples(gbs, mbs * dp)))
        yield Finding(
            path(GBS if view.is_users(GBS) else MBS),
            f"{GBS} {gbs} is not a multiple of micro_batch_size {mbs} x data-parallel size {dp} = {mbs * dp}",
            f"{GBS} {near}; the data-parallel size is {view.layout.world_size} processes / {view.layout.model_parallel_size}",
            fix=(Edit("set", path(GBS), nearest_multiples(gbs, mbs * dp)[-1], safe=False),) if view.is_users(GBS) else (),
        )


def _packed(view: View) -> Iterator[Finding]:
    if view[MBS] != 1 and view[PACKING] is not None:
        yield Finding(
            path(MBS), f"DFM packs samples itself: with micro_batch_size {view[MBS]} it keeps one pack of each microbatch and drops the rest in silence",
            "set train.micro_batch_size to 1; a pack's size is dataset.task_encoder_seq_length", fix=(Edit("set", path(MBS), 1, safe=False),),
        )  # fmt: skip


def _length(view: View) -> Iterator[Finding]:
    if ITERS in view.resolved.unknown:
        return
    iters, samples = view.resolved.spec.values[ITERS], view[SAMPLES]
    if samples is None:
        if iters is None:
            yield Finding(path(ITERS), "neither train.train_iters nor train.train_samples is set: the run has no length", "set one of them")
        return
    if iters is not None:
        given = "" if view.is_users(ITERS) else " (the recipe's)"
        yield Finding(path(SAMPLES), f"train.train_samples {samples} and train.train_iters {iters}{given} both give the run's length", "set train.train_iters to null, or remove train_samples")
    if view[RAMPUP] is not None:
        yield Finding(path(RAMPUP), "a batch size that ramps up needs train_iters; with train_samples it is refused", "use train.train_iters, or remove the ramp")
    if samples < view[GBS]:
        yield Finding(path(SAMPLES), f"train.train_samples {samples} are fewer than one global batch of {view[GBS]}: no iteration would run", f"{view[GBS]} or more")


def _rampup(view: View) -> Iterator[Finding]:
    ramp, gbs = view[RAMPUP], view[GBS]
    if ramp is None:
        return
    if len(ramp) != 3 or not all(isinstance(value, int) and not isinstance(value, bool) for value in ramp):
        yield Finding(path(RAMPUP), f"{RAMPUP} {ramp} is not [start, increment, samples]", f"for example [{max(1, gbs // 2)}, {max(1, gbs // 4)}, 10000]")
        return
    start, increment, samples = ramp
    if start < 1 or increment < 1 or samples < 1:
        yield Finding(path(RAMPUP), f"{RAMPUP} [{start}, {increment}, {samples}]: start, increment and samples must be at least 1", "with 0 samples there is no ramp: remove it")
    elif start >= gbs or (gbs - start) % increment:
        yield Finding(path(RAMPUP), f"from {start} to {GBS} {gbs} in steps of {increment} is no whole number of steps of at least one", f"a start below {gbs} and an increment that divides {gbs - start}" if start < gbs else f"a start below {gbs}")
    elif start % (step := view[MBS] * view.data_parallel_size) or increment % step:
        yield Finding(path(RAMPUP), f"the ramp {start}, {start + increment}, ... is not in multiples of micro_batch_size {view[MBS]} x data-parallel size {view.data_parallel_size} = {step}", f"start and increment in multiples of {step}")


def _mock_length(view: View) -> Iterator[Finding]:
    if not view.is_mock or view[ITERS] is None:
        return
    samples = view.resolved.values.get("dataset.num_train_samples", 1024)
    per_rank, microbatches = samples // view["dataset.micro_batch_size"], view[GBS] // (view[MBS] * view.data_parallel_size)
    evaluations = view[ITERS] // view["train.eval_interval"] + 1 if view["train.eval_iters"] else 0
    needed = (view[ITERS] + evaluations * view["train.eval_iters"]) * microbatches
    if needed > per_rank:
        yield Finding(
            path(ITERS if view.is_users(ITERS) else "data.source"), f"DFM's random data end after {per_rank} batches a rank, and {view[ITERS]} iterations with evaluation need {needed}",
            f"train.train_iters {max(1, per_rank // max(1, microbatches))} and train.eval_iters 0, for example",
        )  # fmt: skip


_NM = "megatron-core num_microbatches_calculator.py"

RULES = (
    Rule(
        "BAT101", "global-batch-not-divisible", ERROR, _global_batch,
        "An iteration is a whole number of microbatches on every data-parallel rank; megatron-core asserts it. With decrease_batch_size_if_needed the batch "
        "is lowered in silence, and a batch that ramps up fails when it arrives there.", _NM,
    ),
    Rule(
        "BAT102", "micro-batch-with-packing", ERROR, _packed,
        "The effective batch is smaller than asked for, in silence.", "NVIDIA DFM data/dit/dit_taskencoder.py, batch", DFM,
    ),
    Rule(
        "BAT103", "run-length-ambiguous", ERROR, _length,
        "Megatron-Bridge asserts that exactly one of the two is set; too few samples give a run of no iterations that ends as a success, in silence.",
        "Megatron-Bridge training/config.py, TrainingConfig.finalize", DFM,
    ),
    Rule(
        "BAT104", "ramp-impossible", ERROR, _rampup,
        "Refused at start, a division by zero, or a step in the middle of the run that does not divide: the last of these passes every check in silence.", _NM, DFM,
    ),
    Rule(
        "BAT105", "batch-lowered-in-silence", WARNING,
        excludes(lambda v: v[DECREASE], at=DECREASE, message="decrease_batch_size_if_needed lowers the global batch without a word when it does not divide",
                 hint=f"set {GBS} to a multiple of micro_batch_size x the data-parallel size"),
        "The learning rate then belongs to another batch size than the one in the file, in silence.", _NM, DFM,
    ),
    Rule(
        "BAT106", "mock-data-end", WARNING, _mock_length,
        "DFM's random dataset has a fixed number of samples a rank (1,024; for FLUX, num_train_samples), shared by training and evaluation, and does not repeat: accepted at start, the run dies in the middle.",
        "NVIDIA DFM data/dit/dit_mock_datamodule.py and those of wan and flux", DFM,
    ),
    Rule(
        "BAT107", "skipped-iteration-outside", HINT,
        excludes(lambda v: [i for i in v["train.iterations_to_skip"] or [] if isinstance(i, int) and not 0 <= i < v[ITERS]], at="train.iterations_to_skip",
                 message=lambda v: f"train.iterations_to_skip names iterations outside 0 to {v[ITERS] - 1}", hint="they are never reached"),
        "Nothing is skipped, in silence.", "Megatron-Bridge training/config.py, TrainingConfig", DFM,
    ),
)  # fmt: skip
