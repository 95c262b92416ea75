"""OPT: the optimizer, the schedule of learning rate and weight decay, and seeds."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import (
    DFM,
    DFM_DIT,
    ERROR,
    HINT,
    ITERS,
    SAMPLES,
    WARNING,
    Check,
    Rule,
    View,
    excludes,
    path,
    requires,
    together,
)
from dfmspec.diagnostics import Finding

LR = "optimizer.lr"
MIN_LR = "optimizer.min_lr"
WARMUP = "scheduler.lr_warmup_iters"
DECAY = "scheduler.lr_decay_iters"

_WARMUP_LR = "scheduler.lr_warmup_init"
_WARMUP_SHARE = "scheduler.lr_warmup_fraction"
_WARMUP_SAMPLES = "scheduler.lr_warmup_samples"
_DECAY_SAMPLES = "scheduler.lr_decay_samples"
_DECAY_STYLE = "scheduler.lr_decay_style"
_WSD_ITERS = "scheduler.lr_wsd_decay_iters"
_WSD_SAMPLES = "scheduler.lr_wsd_decay_samples"
_BY_ITERS = (WARMUP, DECAY, _WSD_ITERS)
_BY_SAMPLES = (_WARMUP_SAMPLES, _DECAY_SAMPLES, _WSD_SAMPLES)

_WD = "optimizer.weight_decay"
_WD_START = "scheduler.start_weight_decay"
_WD_END = "scheduler.end_weight_decay"
_WD_STYLE = "scheduler.weight_decay_incr_style"
_WD_CONDITION = "scheduler.no_weight_decay_cond_type"
_FROM_CONFIG = "scheduler.override_opt_param_scheduler"
_FROM_CHECKPOINT = "scheduler.use_checkpoint_opt_param_scheduler"

_OPTIMIZER = "optimizer.optimizer"
_CLIP = "optimizer.clip_grad"
_PRECISION_AWARE = "optimizer.use_precision_aware_optimizer"
_STATES = (
    "optimizer.main_grads_dtype",
    "optimizer.main_params_dtype",
    "optimizer.exp_avg_dtype",
    "optimizer.exp_avg_sq_dtype",
)
_SEED = "rng.seed"
_DFMS_SEED = 1234
"""The seed that DFM's recipes have anyway."""


def _warmup(view: View) -> Iterator[Finding]:
    warmup = view[WARMUP]
    decay = view[DECAY]
    if warmup >= decay:
        message = f"the warm-up ({warmup} iterations) is not shorter than the decay ({decay})"
        most = decay - 1
        hint = f"at most {most}" if most > 0 else "set it to 0"
        yield Finding(path(WARMUP), message, hint)


def _warmup_steps(view: View) -> Iterator[Finding]:
    fraction = view.or_null(_WARMUP_SHARE)
    samples = view.or_null(_WARMUP_SAMPLES)
    decay = view.or_null(_DECAY_SAMPLES) or view.or_null(SAMPLES)
    # A share of the decay's length.
    if fraction is not None and not 0 <= fraction < 1:
        message = f"lr_warmup_fraction {fraction} is no share below 1 of the decay"
        yield Finding(path(_WARMUP_SHARE), message, "for example 0.05")
    # A number of samples; without a length of its own the decay takes the whole run.
    if samples and decay and samples >= decay:
        message = f"the warm-up ({samples} samples) is not shorter than the decay ({decay})"
        most = decay - 1
        yield Finding(path(_WARMUP_SAMPLES), message, f"at most {most}")


def _spends_much_on_warmup(view: View) -> bool:
    """Whether a warm-up that a person set takes more than a quarter of the run; one of the whole run is OPT102's."""
    if not view.is_set_by_user(WARMUP):
        return False
    iters = view[ITERS]
    warmup = view[WARMUP]
    return bool(warmup < iters < 4 * warmup)


def _warmup_of_run(view: View) -> str:
    warmup = view[WARMUP]
    iters = view[ITERS]
    percent = 100 * warmup // iters
    return f"the warm-up takes {warmup} of {iters} iterations, {percent} %"


def _warms_up_from_above(view: View) -> str:
    return f"{_WARMUP_LR} {view[_WARMUP_LR]} is above {LR} {view[LR]}, so the warm-up would be a fall"


def _mixed_units(view: View) -> Iterator[Finding]:
    # The schedule counts in what the run's length is given in.
    if view.or_null(SAMPLES) is not None:
        unit = "samples"
        wrong = _BY_ITERS
    else:
        unit = "iterations"
        wrong = _BY_SAMPLES
    for key in view.set_by_user(*wrong):
        if view[key]:
            message = f"{key} counts in the other unit than this run, whose length is given in {unit}"
            yield Finding(path(key), message, "remove it, and use the key of the same unit")
    # A share leaves nothing to give in either unit.
    if view.or_null(_WARMUP_SHARE) is not None:
        for key in view.set_by_user(WARMUP, _WARMUP_SAMPLES):
            if view[key]:
                message = f"{key} and {_WARMUP_SHARE} both give the warm-up"
                yield Finding(path(key), message, "keep one of the two")


def _wsd_length(view: View) -> str:
    """The key of how long the decay WSD falls, in the unit of the run's length."""
    return _WSD_ITERS if view.or_null(SAMPLES) is None else _WSD_SAMPLES


def _weight_decay(view: View) -> Iterator[Finding]:
    start = view[_WD_START]
    end = view[_WD_END]
    if start < 0 or end < start:
        at = _WD_END if view.is_set_by_user(_WD_END) else _WD_START
        message = f"weight decay from {start} to {end}: it must start at 0 or more and not fall"
        yield Finding(path(at), message, "set both to one value")
    elif view[_WD_STYLE] == "constant" and start != end:
        at = _WD_STYLE if view.is_set_by_user(_WD_STYLE) else _WD_END
        message = f"a constant weight decay cannot go from {start} to {end}"
        yield Finding(path(at), message, "set both to one value, or weight_decay_incr_style to linear or cosine")


def _state_formats(view: View) -> Iterator[Finding]:
    for key in _STATES:
        if view[key] != "torch.float32" and not view[_PRECISION_AWARE]:
            yield Finding(
                path(key),
                f"{key} {view[key]} needs the precision-aware optimizer, which is off",
                f"set {_PRECISION_AWARE} to true, or {key} to torch.float32",
            )


def _share_of_the_past(key: str) -> Check:
    """How much of a running mean is kept at each step: with 1 it would take in nothing new."""
    return excludes(
        lambda v: not 0 <= v[key] < 1,
        at=key,
        message=lambda v: f"{key} {v[key]} must be at least 0 and below 1",
        hint="0.9 and 0.95 are usual",
    )


_OC = "megatron-core optimizer/optimizer_config.py, __post_init__"
_OPS = "megatron-core optimizer_param_scheduler.py"
_SC = "Megatron-Bridge training/config.py, SchedulerConfig.finalize"

RULES = (
    # The learning rate and the weight decay over a run.
    Rule(
        "OPT101",
        "min-lr-above-lr",
        ERROR,
        excludes(
            lambda v: v[MIN_LR] > v[LR],
            at=MIN_LR,
            message=lambda v: f"{MIN_LR} {v[MIN_LR]} is above {LR} {v[LR]}, so the decay would be a rise",
            hint="remove optimizer.min_lr to have a tenth of lr",
        ),
        "megatron-core asserts it when the scheduler is built, with an empty message.",
        _OPS,
    ),
    Rule(
        "OPT102",
        "warmup-not-shorter-than-decay",
        ERROR,
        _warmup,
        "megatron-core asserts it when the scheduler is built, with an empty message.",
        _OPS,
    ),
    Rule(
        "OPT103",
        "weight-decay-overwritten",
        WARNING,
        excludes(
            lambda v: v.is_set_by_user(_WD) and not v.set_by_user(_WD_START, _WD_END),
            at=_WD,
            message=(
                "DFM's scheduler overwrites optimizer.weight_decay "
                "with its own start_weight_decay (0.033) in the first iteration"
            ),
            hint="the plan sets scheduler.start_weight_decay and end_weight_decay to it; write those to be silent",
        ),
        "Without the derived twins the value has no effect upstream, in silence.",
        f"{_OPS}, step; Megatron-Bridge recipes/utils/optimizer_utils.py",
        targets=DFM,
    ),
    Rule(
        "OPT104",
        "weight-decay-schedule-impossible",
        ERROR,
        _weight_decay,
        "Asserted at start or when the scheduler is built, mostly with an empty message.",
        f"{_SC}; {_OPS}",
    ),
    Rule(
        "OPT105",
        "warmup-start-above-lr",
        ERROR,
        excludes(
            lambda v: v[_WARMUP_LR] > v[LR],
            at=_WARMUP_LR,
            message=_warms_up_from_above,
            hint="0 is usual",
        ),
        "megatron-core asserts it when the scheduler is built, with an empty message.",
        _OPS,
    ),
    Rule(
        "OPT106",
        "warmup-long",
        HINT,
        excludes(
            _spends_much_on_warmup,
            at=WARMUP,
            message=_warmup_of_run,
            hint="5 to 10 % is usual; remove it to have 5 %",
        ),
        "Most of a short run would be spent below the learning rate that was asked for.",
        "the how-to's shorter runs keep the recipe's 2,000 iterations",
    ),
    # Where the schedule comes from, and in what it counts.
    Rule(
        "OPT107",
        "schedule-units-mixed",
        ERROR,
        _mixed_units,
        "Megatron-Bridge asserts that iterations and samples are not mixed.",
        _SC,
        targets=DFM,
    ),
    Rule(
        "OPT108",
        "schedule-from-two-sources",
        ERROR,
        excludes(
            lambda v: v[_FROM_CONFIG] and v[_FROM_CHECKPOINT],
            at=_FROM_CHECKPOINT,
            message=(
                "the schedule is to come from the configuration "
                "(override_opt_param_scheduler, the recipe's choice) and from the checkpoint"
            ),
            hint="set scheduler.override_opt_param_scheduler to false",
        ),
        "Asserted at start.",
        _SC,
        targets=DFM,
    ),
    Rule(
        "OPT109",
        "wsd-without-decay",
        ERROR,
        excludes(
            lambda v: v[_DECAY_STYLE] == "WSD" and v.or_null(_wsd_length(v)) is None,
            at=_DECAY_STYLE,
            message=lambda v: f"the decay WSD needs {_wsd_length(v)}",
            hint="a tenth of the run, for example",
        ),
        "megatron-core asserts it when the scheduler is built, with an empty message.",
        _OPS,
        targets=DFM,
    ),
    Rule(
        "OPT110",
        "weight-decay-condition-unusable",
        ERROR,
        excludes(
            lambda v: v.or_null(_WD_CONDITION) is not None,
            at=_WD_CONDITION,
            message="no_weight_decay_cond_type is not usable at this revision",
            hint="remove it",
        ),
        "The optimizer cannot be built: a NotImplementedError.",
        "Megatron-Bridge training/setup.py",
        targets=DFM,
    ),
    # The optimizer and what it keeps.
    Rule(
        "OPT111",
        "precision-aware-optimizer-impossible",
        ERROR,
        together(
            requires(
                _PRECISION_AWARE,
                (_OPTIMIZER, "adam"),
                ("optimizer.use_distributed_optimizer", True),
                because="only that one keeps its state in low precision",
            ),
            _state_formats,
        ),
        "megatron-core asserts it before the optimizer is built.",
        _OC,
        targets=DFM,
    ),
    Rule(
        "OPT112",
        "optimizer-offload-impossible",
        ERROR,
        requires(
            "optimizer.optimizer_cpu_offload",
            ("optimizer.decoupled_weight_decay", True),
            because="the hybrid optimizer is AdamW",
        ),
        "The optimizer cannot be built.",
        "megatron-core optimizer/__init__.py",
        targets=DFM,
    ),
    Rule(
        "OPT113",
        "optimizer-unknown",
        ERROR,
        excludes(
            lambda v: v[_OPTIMIZER] not in ("adam", "sgd", "muon", "dist_muon"),
            at=_OPTIMIZER,
            message=lambda v: f"optimizer {v[_OPTIMIZER]} is not supported",
            hint="adam, sgd, muon or dist_muon",
        ),
        "The optimizer cannot be built.",
        "megatron-core optimizer/__init__.py",
        targets=DFM,
    ),
    # A warm-up in other units than iterations.
    Rule(
        "OPT114",
        "warmup-share-impossible",
        ERROR,
        _warmup_steps,
        "megatron-core asserts it when the scheduler is built, with an empty message.",
        _OPS,
        targets=DFM,
    ),
    # Random numbers.
    Rule(
        "OPT115",
        "random-initialisation-per-replica",
        WARNING,
        excludes(
            lambda v: v["rng.data_parallel_random_init"],
            at="rng.data_parallel_random_init",
            message="data_parallel_random_init gives every data-parallel rank other weights",
            hint="set it to false; it serves debugging",
        ),
        "Replicas start apart and are averaged in gradients only, in silence.",
        "Megatron-Bridge training/initialize.py",
        targets=DFM,
    ),
    Rule(
        "OPT116",
        "seed-not-positive",
        ERROR,
        excludes(
            lambda v: v[_SEED] <= 0,
            at=_SEED,
            message=lambda v: f"{_SEED} {v[_SEED]} is not positive",
            hint="1 or more",
        ),
        "Megatron-Bridge refuses it when the random states are set.",
        "Megatron-Bridge training/initialize.py",
        targets=DFM,
    ),
    Rule(
        "OPT117",
        "seed-does-not-reach-noise",
        HINT,
        excludes(
            lambda v: v.is_set_by_user(_SEED) and v[_SEED] > 0 and v[_SEED] != _DFMS_SEED,
            at=_SEED,
            message=(
                "rng.seed changes weights and data order only: "
                "DFM draws noise and noise levels from fixed seeds, afresh after each resume"
            ),
            hint="target: megatron_core draws them from the seed",
        ),
        "Two runs with other seeds see the same noise, and a resumed run repeats it, in silence.",
        "NVIDIA DFM model/dit/edm/edm_pipeline.py",
        targets=DFM_DIT,
    ),
    # Adam's own constants.
    Rule(
        "OPT118",
        "adam-constants-impossible",
        ERROR,
        together(
            _share_of_the_past("optimizer.adam_beta1"),
            _share_of_the_past("optimizer.adam_beta2"),
            excludes(
                lambda v: v[_CLIP] < 0,
                at=_CLIP,
                message=lambda v: f"{_CLIP} {v[_CLIP]} is below 0",
                hint="0 for no clipping",
            ),
        ),
        "Accepted at start; the optimizer diverges or does not clip, in silence.",
        "Kingma and Ba 2015; megatron-core optimizer",
        targets=DFM,
    ),
)
