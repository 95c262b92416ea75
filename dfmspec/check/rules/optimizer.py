"""OPT: the optimizer, the schedule of learning rate and weight decay, and seeds."""

from __future__ import annotations

from collections.abc import Iterator

from dfmspec.check.rules.base import DFM, DFM_DIT, ERROR, HINT, ITERS, SAMPLES, WARNING, Rule, View, excludes, path, requires, together
from dfmspec.diagnostics import Finding

LR, MIN_LR, WARMUP, DECAY = "optimizer.lr", "optimizer.min_lr", "scheduler.lr_warmup_iters", "scheduler.lr_decay_iters"
S = "scheduler."
WD = (f"{S}start_weight_decay", f"{S}end_weight_decay")


def _warmup(view: View) -> Iterator[Finding]:
    warmup, decay = view[WARMUP], view[DECAY]
    if decay is not None and warmup >= decay:
        yield Finding(
            path(WARMUP), f"the warm-up ({warmup} iterations) is not shorter than the decay ({decay})", f"at most {decay - 1}" if decay > 1 else "set it to 0",
        )  # fmt: skip


def _warmup_steps(view: View) -> Iterator[Finding]:
    fraction, samples, decay = view[f"{S}lr_warmup_fraction"], view[f"{S}lr_warmup_samples"], view[f"{S}lr_decay_samples"] or view[SAMPLES]
    if fraction is not None and not 0 <= fraction < 1:
        yield Finding(path(f"{S}lr_warmup_fraction"), f"lr_warmup_fraction {fraction} is no share below 1 of the decay", "for example 0.05")
    if samples and decay and samples >= decay:
        yield Finding(path(f"{S}lr_warmup_samples"), f"the warm-up ({samples} samples) is not shorter than the decay ({decay})", f"at most {decay - 1}")


_BY_ITERS = (WARMUP, DECAY, f"{S}lr_wsd_decay_iters")
_BY_SAMPLES = (f"{S}lr_warmup_samples", f"{S}lr_decay_samples", f"{S}lr_wsd_decay_samples")


def _mixed_units(view: View) -> Iterator[Finding]:
    wrong, unit = (_BY_ITERS, "samples") if view[SAMPLES] is not None else (_BY_SAMPLES, "iterations")
    for key in view.users(*wrong):
        if view[key]:
            yield Finding(path(key), f"{key} counts in the other unit than this run, whose length is given in {unit}", "remove it, and use the key of the same unit")
    if view[f"{S}lr_warmup_fraction"] is not None:
        for key in view.users(WARMUP, f"{S}lr_warmup_samples"):
            if view[key]:
                yield Finding(path(key), f"{key} and scheduler.lr_warmup_fraction both give the warm-up", "keep one of the two")


def _weight_decay(view: View) -> Iterator[Finding]:
    start, end = view[WD[0]], view[WD[1]]
    if start < 0 or end < start:
        yield Finding(path(WD[1] if view.is_users(WD[1]) else WD[0]), f"weight decay from {start} to {end}: it must start at 0 or more and not fall", "set both to one value")
    elif view[f"{S}weight_decay_incr_style"] == "constant" and start != end:
        yield Finding(path(f"{S}weight_decay_incr_style" if view.is_users(f"{S}weight_decay_incr_style") else WD[1]), f"a constant weight decay cannot go from {start} to {end}", "set both to one value, or weight_decay_incr_style to linear or cosine")


_PRECISION_AWARE = "optimizer.use_precision_aware_optimizer"
_STATES = ("optimizer.main_grads_dtype", "optimizer.main_params_dtype", "optimizer.exp_avg_dtype", "optimizer.exp_avg_sq_dtype")


def _state_formats(view: View) -> Iterator[Finding]:
    for key in _STATES:
        if view[key] != "torch.float32" and not view[_PRECISION_AWARE]:
            yield Finding(path(key), f"{key} {view[key]} needs the precision-aware optimizer, which is off", f"set {_PRECISION_AWARE} to true, or {key} to torch.float32")


_OC = "megatron-core optimizer/optimizer_config.py, __post_init__"
_OPS = "megatron-core optimizer_param_scheduler.py"
_SC = "Megatron-Bridge training/config.py, SchedulerConfig.finalize"

RULES = (
    Rule(
        "OPT101", "min-lr-above-lr", ERROR,
        excludes(lambda v: v[MIN_LR] > v[LR], at=MIN_LR, message=lambda v: f"optimizer.min_lr {v[MIN_LR]} is above optimizer.lr {v[LR]}, so the decay would be a rise",
                 hint="remove optimizer.min_lr to have a tenth of lr"),
        "megatron-core asserts it when the scheduler is built, with an empty message.", _OPS,
    ),
    Rule("OPT102", "warmup-not-shorter-than-decay", ERROR, _warmup, "megatron-core asserts it when the scheduler is built, with an empty message.", _OPS),
    Rule(
        "OPT103", "weight-decay-overwritten", WARNING,
        excludes(lambda v: v.is_users("optimizer.weight_decay") and not v.users(*WD), at="optimizer.weight_decay",
                 message="DFM's scheduler overwrites optimizer.weight_decay with its own start_weight_decay (0.033) in the first iteration",
                 hint="the plan sets scheduler.start_weight_decay and end_weight_decay to it; write those to be silent"),
        "Without the derived twins the value has no effect upstream, in silence.", f"{_OPS}, step; Megatron-Bridge recipes/utils/optimizer_utils.py", DFM,
    ),
    Rule("OPT104", "weight-decay-schedule-impossible", ERROR, _weight_decay, "Asserted at start or when the scheduler is built, mostly with an empty message.", f"{_SC}; {_OPS}"),
    Rule(
        "OPT105", "warmup-start-above-lr", ERROR,
        excludes(lambda v: v[f"{S}lr_warmup_init"] > v[LR], at=f"{S}lr_warmup_init",
                 message=lambda v: f"scheduler.lr_warmup_init {v[f'{S}lr_warmup_init']} is above optimizer.lr {v[LR]}, so the warm-up would be a fall", hint="0 is usual"),
        "megatron-core asserts it when the scheduler is built, with an empty message.", _OPS,
    ),
    Rule(
        "OPT106", "warmup-long", HINT,
        excludes(lambda v: v.is_users(WARMUP) and v[ITERS] is not None and 4 * v[WARMUP] > v[ITERS] > v[WARMUP], at=WARMUP,
                 message=lambda v: f"the warm-up takes {v[WARMUP]} of {v[ITERS]} iterations, {100 * v[WARMUP] // v[ITERS]} %", hint="5 to 10 % is usual; remove it to have 5 %"),
        "Most of a short run would be spent below the learning rate that was asked for.", "the how-to's shorter runs keep the recipe's 2,000 iterations",
    ),
    Rule("OPT107", "schedule-units-mixed", ERROR, _mixed_units, "Megatron-Bridge asserts that iterations and samples are not mixed.", _SC, DFM),
    Rule(
        "OPT108", "schedule-from-two-sources", ERROR,
        excludes(lambda v: v[f"{S}override_opt_param_scheduler"] and v[f"{S}use_checkpoint_opt_param_scheduler"], at=f"{S}use_checkpoint_opt_param_scheduler",
                 message="the schedule is to come from the configuration (override_opt_param_scheduler, the recipe's choice) and from the checkpoint",
                 hint="set scheduler.override_opt_param_scheduler to false"),
        "Asserted at start.", _SC, DFM,
    ),
    Rule(
        "OPT109", "wsd-without-decay", ERROR,
        excludes(lambda v: v[f"{S}lr_decay_style"] == "WSD" and v[f"{S}lr_wsd_decay_iters" if v[SAMPLES] is None else f"{S}lr_wsd_decay_samples"] is None, at=f"{S}lr_decay_style",
                 message=lambda v: f"the decay WSD needs scheduler.lr_wsd_decay_{'iters' if v[SAMPLES] is None else 'samples'}", hint="a tenth of the run, for example"),
        "megatron-core asserts it when the scheduler is built, with an empty message.", _OPS, DFM,
    ),
    Rule(
        "OPT110", "weight-decay-condition-unusable", ERROR,
        excludes(lambda v: v[f"{S}no_weight_decay_cond_type"] is not None, at=f"{S}no_weight_decay_cond_type",
                 message="no_weight_decay_cond_type is not usable at this revision", hint="remove it"),
        "The optimizer cannot be built: a NotImplementedError.", "Megatron-Bridge training/setup.py", DFM,
    ),
    Rule(
        "OPT111", "precision-aware-optimizer-impossible", ERROR,
        together(
            requires(_PRECISION_AWARE, ("optimizer.optimizer", "adam"), ("optimizer.use_distributed_optimizer", True), because="only that one keeps its state in low precision"),
            _state_formats,
        ),
        "megatron-core asserts it before the optimizer is built.", _OC, DFM,
    ),
    Rule(
        "OPT112", "optimizer-offload-impossible", ERROR,
        requires("optimizer.optimizer_cpu_offload", ("optimizer.decoupled_weight_decay", True), because="the hybrid optimizer is AdamW"),
        "The optimizer cannot be built.", "megatron-core optimizer/__init__.py", DFM,
    ),
    Rule(
        "OPT113", "optimizer-unknown", ERROR,
        excludes(lambda v: v["optimizer.optimizer"] not in ("adam", "sgd", "muon", "dist_muon"), at="optimizer.optimizer",
                 message=lambda v: f"optimizer {v['optimizer.optimizer']} is not supported", hint="adam, sgd, muon or dist_muon"),
        "The optimizer cannot be built.", "megatron-core optimizer/__init__.py", DFM,
    ),
    Rule("OPT114", "warmup-share-impossible", ERROR, _warmup_steps, "megatron-core asserts it when the scheduler is built, with an empty message.", _OPS, DFM),
    Rule(
        "OPT115", "random-initialisation-per-replica", WARNING,
        excludes(lambda v: v["rng.data_parallel_random_init"], at="rng.data_parallel_random_init",
                 message="data_parallel_random_init gives every data-parallel rank other weights", hint="set it to false; it serves debugging"),
        "Replicas start apart and are averaged in gradients only, in silence.", "Megatron-Bridge training/initialize.py", DFM,
    ),
    Rule(
        "OPT116", "seed-not-positive", ERROR,
        excludes(lambda v: v["rng.seed"] <= 0, at="rng.seed", message=lambda v: f"rng.seed {v['rng.seed']} is not positive", hint="1 or more"),
        "Megatron-Bridge refuses it when the random states are set.", "Megatron-Bridge training/initialize.py", DFM,
    ),
    Rule(
        "OPT117", "seed-does-not-reach-noise", HINT,
        excludes(lambda v: v.is_users("rng.seed") and v["rng.seed"] > 0 and v["rng.seed"] != 1234, at="rng.seed",
                 message="rng.seed changes weights and data order only: DFM draws noise and noise levels from fixed seeds, afresh after each resume",
                 hint="target: megatron_core draws them from the seed"),
        "Two runs with other seeds see the same noise, and a resumed run repeats it, in silence.", "NVIDIA DFM model/dit/edm/edm_pipeline.py", DFM_DIT,
    ),
    Rule(
        "OPT118", "adam-constants-impossible", ERROR,
        together(
            *(
                excludes(lambda v, key=key: not 0 <= v[key] < 1, at=key, message=lambda v, key=key: f"{key} {v[key]} must be at least 0 and below 1", hint="0.9 and 0.95 are usual")  # type: ignore[misc]
                for key in ("optimizer.adam_beta1", "optimizer.adam_beta2")
            ),
            excludes(lambda v: v["optimizer.clip_grad"] < 0, at="optimizer.clip_grad", message=lambda v: f"optimizer.clip_grad {v['optimizer.clip_grad']} is below 0", hint="0 for no clipping"),
        ),
        "Accepted at start; the optimizer diverges or does not clip, in silence.", "Kingma and Ba 2015; megatron-core optimizer", DFM,
    ),
)  # fmt: skip
