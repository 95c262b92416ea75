"""BAT: batch sizes and the length of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dfmspec.check.rules.base import (
    DFM,
    ERROR,
    GBS,
    HINT,
    ITERS,
    MBS,
    SAMPLES,
    WARNING,
    Rule,
    View,
    excludes,
    listed,
    path,
)
from dfmspec.check.rules.sequence import PACKING
from dfmspec.diagnostics import Edit, Finding
from dfmspec.targets.layout import nearest_multiples

RAMPUP = "train.rampup_batch_size"
DECREASE = "train.decrease_batch_size_if_needed"
_SKIPPED = "train.iterations_to_skip"


def _global_batch(view: View) -> Iterator[Finding]:
    gbs = view[GBS]
    mbs = view[MBS]
    dp = view.data_parallel_size
    step = mbs * dp
    if gbs % step == 0:
        return
    near = nearest_multiples(gbs, step)
    at = MBS
    fix: tuple[Edit, ...] = ()
    if view.is_set_by_user(GBS):
        at = GBS
        fix = (Edit("set", path(GBS), near[-1], safe=False),)
    layout = view.layout
    yield Finding(
        path(at),
        f"{GBS} {gbs} is not a multiple of micro_batch_size {mbs} x data-parallel size {dp} = {step}",
        f"{GBS} {listed(near, ' or ')}; "
        f"the data-parallel size is {layout.world_size} processes / {layout.model_parallel_size}",
        fix=fix,
    )


def _packed(view: View) -> Iterator[Finding]:
    mbs = view[MBS]
    if mbs == 1 or view.or_null(PACKING) is None:
        return
    yield Finding(
        path(MBS),
        f"DFM packs samples itself: with micro_batch_size {mbs} it keeps one pack of each microbatch "
        "and drops the rest in silence",
        "set train.micro_batch_size to 1; a pack's size is dataset.task_encoder_seq_length",
        fix=(Edit("set", path(MBS), 1, safe=False),),
    )


def _length(view: View) -> Iterator[Finding]:
    # The iterations as written: resolved, they follow from the samples.
    if ITERS in view.resolved.unknown:
        return
    iters = view.resolved.spec.values[ITERS]
    samples = view.or_null(SAMPLES)

    # Neither is given.
    if samples is None:
        if iters is None:
            yield Finding(
                path(ITERS),
                "neither train.train_iters nor train.train_samples is set: the run has no length",
                "set one of them",
            )
        return

    # Both are.
    if iters is not None:
        given = "" if view.is_set_by_user(ITERS) else " (the recipe's)"
        yield Finding(
            path(SAMPLES),
            f"train.train_samples {samples} and train.train_iters {iters}{given} both give the run's length",
            "set train.train_iters to null, or remove train_samples",
        )

    # The samples alone: what they exclude, and whether they are enough.
    if view.or_null(RAMPUP) is not None:
        yield Finding(
            path(RAMPUP),
            "a batch size that ramps up needs train_iters; with train_samples it is refused",
            "use train.train_iters, or remove the ramp",
        )
    gbs = view[GBS]
    if samples < gbs:
        yield Finding(
            path(SAMPLES),
            f"train.train_samples {samples} are fewer than one global batch of {gbs}: no iteration would run",
            f"{gbs} or more",
        )


def _are_three_integers(ramp: list[Any]) -> bool:
    # A bool is an int to Python.
    return len(ramp) == 3 and all(isinstance(value, int) and not isinstance(value, bool) for value in ramp)


def _rampup(view: View) -> Iterator[Finding]:
    ramp = view[RAMPUP]
    gbs = view[GBS]

    # Its form.
    if not _are_three_integers(ramp):
        half = max(1, gbs // 2)
        quarter = max(1, gbs // 4)
        yield Finding(
            path(RAMPUP),
            f"{RAMPUP} {ramp} is not [start, increment, samples]",
            f"for example [{half}, {quarter}, 10000]",
        )
        return
    start, increment, samples = ramp
    if start < 1 or increment < 1 or samples < 1:
        yield Finding(
            path(RAMPUP),
            f"{RAMPUP} [{start}, {increment}, {samples}]: start, increment and samples must be at least 1",
            "with 0 samples there is no ramp: remove it",
        )
        return

    # Whole steps lead from the start to the global batch.
    if start >= gbs or (gbs - start) % increment:
        hint = f"a start below {gbs}"
        if start < gbs:
            hint += f" and an increment that divides {gbs - start}"
        yield Finding(
            path(RAMPUP),
            f"from {start} to {GBS} {gbs} in steps of {increment} is no whole number of steps of at least one",
            hint,
        )
        return

    # Every batch on the way divides, too.
    mbs = view[MBS]
    dp = view.data_parallel_size
    step = mbs * dp
    if start % step or increment % step:
        second = start + increment
        yield Finding(
            path(RAMPUP),
            f"the ramp {start}, {second}, ... is not in multiples of micro_batch_size {mbs} x data-parallel size {dp} "
            f"= {step}",
            f"start and increment in multiples of {step}",
        )


def _mock_length(view: View) -> Iterator[Finding]:
    if not view.is_mock or view[ITERS] is None:
        return
    iters = view[ITERS]

    # What there is: a rank's batches, which training and evaluation share.
    samples = view.resolved.values.get("dataset.num_train_samples", 1024)
    per_rank = samples // view["dataset.micro_batch_size"]

    # What is taken: a batch a microbatch, in training and in each evaluation.
    microbatches = view[GBS] // (view[MBS] * view.data_parallel_size)
    eval_iters = view["train.eval_iters"]
    evaluations = 0
    if eval_iters:
        evaluations = iters // view["train.eval_interval"] + 1
    needed = (iters + evaluations * eval_iters) * microbatches
    if needed <= per_rank:
        return

    enough = max(1, per_rank // max(1, microbatches))
    yield Finding(
        path(view.key_set_by_user(ITERS, otherwise="data.source")),
        f"DFM's random data end after {per_rank} batches a rank, and {iters} iterations with evaluation need {needed}",
        f"train.train_iters {enough} and train.eval_iters 0, for example",
    )


def _skips_outside(view: View) -> bool:
    skipped = view[_SKIPPED] or []
    numbers = [number for number in skipped if isinstance(number, int)]
    return any(not 0 <= number < view[ITERS] for number in numbers)


def _iterations_outside(view: View) -> str:
    last = view[ITERS] - 1
    return f"{_SKIPPED} names iterations outside 0 to {last}"


_NM = "megatron-core num_microbatches_calculator.py"

RULES = (
    Rule(
        "BAT101",
        "global-batch-not-divisible",
        ERROR,
        _global_batch,
        "An iteration is a whole number of microbatches on every data-parallel rank; megatron-core asserts it. "
        "With decrease_batch_size_if_needed the batch is lowered in silence, and a batch that ramps up fails when it "
        "arrives there.",
        _NM,
    ),
    Rule(
        "BAT102",
        "micro-batch-with-packing",
        ERROR,
        _packed,
        "The effective batch is smaller than asked for, in silence.",
        "NVIDIA DFM data/dit/dit_taskencoder.py, batch",
        targets=DFM,
    ),
    Rule(
        "BAT103",
        "run-length-ambiguous",
        ERROR,
        _length,
        "Megatron-Bridge asserts that exactly one of the two is set; too few samples give a run of no iterations that "
        "ends as a success, in silence.",
        "Megatron-Bridge training/config.py, TrainingConfig.finalize",
        targets=DFM,
    ),
    Rule(
        "BAT104",
        "ramp-impossible",
        ERROR,
        _rampup,
        "Refused at start, a division by zero, or a step in the middle of the run that does not divide: "
        "the last of these passes every check in silence.",
        _NM,
        targets=DFM,
    ),
    Rule(
        "BAT105",
        "batch-lowered-in-silence",
        WARNING,
        excludes(
            lambda v: v[DECREASE],
            at=DECREASE,
            message="decrease_batch_size_if_needed lowers the global batch without a word when it does not divide",
            hint=f"set {GBS} to a multiple of micro_batch_size x the data-parallel size",
        ),
        "The learning rate then belongs to another batch size than the one in the file, in silence.",
        _NM,
        targets=DFM,
    ),
    Rule(
        "BAT106",
        "mock-data-end",
        WARNING,
        _mock_length,
        "DFM's random dataset has a fixed number of samples a rank (1,024; for FLUX, num_train_samples), shared by "
        "training and evaluation, and does not repeat: accepted at start, the run dies in the middle.",
        "NVIDIA DFM data/dit/dit_mock_datamodule.py and those of wan and flux",
        targets=DFM,
    ),
    Rule(
        "BAT107",
        "skipped-iteration-outside",
        HINT,
        excludes(
            _skips_outside,
            at=_SKIPPED,
            message=_iterations_outside,
            hint="they are never reached",
        ),
        "Nothing is skipped, in silence.",
        "Megatron-Bridge training/config.py, TrainingConfig",
        targets=DFM,
    ),
)
