"""What NVIDIA DFM's three scripts share at 7cb7634: derived values, the override file, the arguments.

A script reads one override file and knows nothing of dfmspec. Upstream keeps copies of derived values that it never
recomputes, so every one is written out; a section that it skips in silence is never emitted. See docs/deviations.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dfmspec.diagnostics import Severity
from dfmspec.errors import InvalidSpec
from dfmspec.spec.paths import RUN_DIR, RUN_DIR_UPSTREAM, SPEC_DIR, SPEC_DIR_UPSTREAM
from dfmspec.targets import CONFIG, Derived, Reading, Values, catalogue, minutes_of
from dfmspec.targets.derivations import SHARED, copied, warmup_iterations
from dfmspec.targets.dfm import Refused
from dfmspec.targets.dfm.bridge import BRIDGE_PRECISION, CLASSES, PRECISIONS
from dfmspec.targets.layout import layout_of

SPEC_MOCK_DATA = (
    "data:\n  source: mock  # random data, for a trial; for your own: webdataset, and dataset: {path: ...}\n"
)
ENERGON = 6
SUBJECT = "[NVIDIA DFM](https://github.com/NVIDIA-NeMo/DFM)'s script"
DETERMINISTIC_ENV = {
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}

# Precision: upstream copies it over the model, the optimizer and DDP.

_PRECISION = BRIDGE_PRECISION | {"grad_reduce_in_fp32": False}
"""Megatron-Bridge's defaults with DFM's own choice, which the recipe makes for bf16_mixed and a name would lose."""


def _named_precision(field: str) -> Derived:
    """A field of the precision, as the named recipe has it."""

    def value(values: Values) -> Any:
        named = PRECISIONS.get(values["mixed_precision.recipe"], {})
        return named.get(field, _PRECISION[field])

    return Derived(
        key=f"mixed_precision.{field}",
        sources=("mixed_precision.recipe",),
        value=value,
        formula="mixed_precision.recipe",
    )


# The length of a run: upstream counts in iterations or in samples, and refuses both.


def _train_iters(values: Values) -> Any:
    samples = values["train.train_samples"]
    if samples is None:
        return None
    return samples // values["train.global_batch_size"]


def _lr_decay_iters(values: Values) -> Any:
    if values["train.train_samples"] is not None:
        return None
    return values["train.train_iters"]


def _lr_warmup_iters(values: Values) -> int:
    by_samples = values["train.train_samples"] is not None
    by_fraction = values["scheduler.lr_warmup_fraction"] is not None
    if by_samples or by_fraction:
        return 0
    return warmup_iterations(values)


def _exit_duration_in_mins(values: Values) -> int | None:
    minutes = minutes_of(values["launcher.time_limit"])
    if minutes is None or values["launcher.kind"] != "slurm":
        return None
    before: int = values["launcher.stop_before"]
    return math.ceil(minutes - before / 60)


# Keys that upstream turns on in pairs, and those that it turns off under Megatron FSDP.

_FSDP = ("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp")


def _has_fsdp(values: Values) -> bool:
    return any(values[key] for key in _FSDP)


def _either(key: str, other: str) -> Derived:
    """One of two keys of which upstream turns on both when one is on."""
    return Derived(
        key=key,
        sources=(other,),
        value=lambda v: bool(v[key] or v[other]),
        formula=other,
        differing=Severity.ERROR,
        alone=True,
    )


def _always(values: Values) -> bool:
    return True


def _precision_aware(values: Values) -> bool:
    return bool(values["optimizer.use_precision_aware_optimizer"])


def _under_fsdp(key: str, upstream: bool, formula: str, when: Callable[[Values], bool] = _always) -> Derived:
    """A key that upstream turns off under Megatron FSDP; `upstream`: what null is without it."""

    def value(values: Values) -> bool:
        if _has_fsdp(values) and when(values):
            return False
        if values[key] is None:
            return upstream
        return bool(values[key])

    return Derived(
        key=key,
        sources=_FSDP,
        value=value,
        formula=formula,
        differing=Severity.ERROR,
        alone=True,
    )


# Overlap of messages and computation: a comm_overlap section writes over keys of other sections.

_OVERLAP_FIELDS = tuple(f"comm_overlap.{name}" for name in catalogue("dfm").fields("comm_overlap"))


def _has_overlap_section(values: Values) -> bool:
    return any(values[field] is not None for field in _OVERLAP_FIELDS)


def _off(values: Values) -> bool:
    return False


def _overlapped(section: str, name: str, upstream: Any, default: Callable[[Values], Any] = _off) -> Derived:
    """A key that a comm_overlap section overwrites, with its own value or its own default."""
    key = f"{section}.{name}"
    twin = f"comm_overlap.{name}"

    def value(values: Values) -> Any:
        # Outside the model, upstream writes under a distributed optimizer alone.
        reaches = _has_overlap_section(values) and (section == "model" or values["ddp.use_distributed_optimizer"])
        if not reaches:
            return upstream if values[key] is None else values[key]

        chosen = default(values) if values.get(twin) is None else values[twin]
        # Overlap over TP needs sequences that are split, and is turned off without.
        if name == "tp_comm_overlap":
            return chosen and _splits_sequences(values)
        return chosen

    return Derived(
        key=key,
        sources=(twin, "comm_overlap.tp_comm_overlap"),
        value=value,
        formula=f"{twin}, or its default when there is a comm_overlap section",
    )


def _splits_sequences(values: Values) -> bool:
    return bool(values["model.tensor_model_parallel_size"] > 1 and values["model.sequence_parallel"])


def _has_replicas(values: Values) -> bool:
    return layout_of(values).data_parallel_size > 1


def _has_chunks(values: Values) -> bool | None:
    """Whether pipeline stages have several chunks; None: there is one stage."""
    has_stages = values["model.pipeline_model_parallel_size"] > 1
    if not has_stages:
        return None
    chunks: int = values["model.virtual_pipeline_model_parallel_size"] or 1
    return chunks > 1


def _bucket_size(values: Values) -> int | None:
    if not _has_replicas(values):
        return None
    return 128 * 2**20


def _align_param_gather(values: Values) -> bool:
    return _has_replicas(values) and _has_chunks(values) is True


OVERLAPS: tuple[Derived, ...] = (
    _overlapped("model", "tp_comm_overlap", False),
    _overlapped("model", "defer_embedding_wgrad_compute", False),
    _overlapped("model", "overlap_moe_expert_parallel_comm", False),
    _overlapped("model", "delay_wgrad_compute", False),
    _overlapped("model", "wgrad_deferral_limit", 0, lambda v: -1),
    # Interleaved stages overlap their messages; plain ones send them in batches.
    _overlapped("model", "overlap_p2p_comm", False, lambda v: _has_chunks(v) is True),
    _overlapped("model", "batch_p2p_comm", True, lambda v: _has_chunks(v) is False),
    # Replicas overlap their reduction of gradients and their gathering of parameters.
    _overlapped("ddp", "bucket_size", None, _bucket_size),
    _overlapped("ddp", "overlap_grad_reduce", False, _has_replicas),
    _overlapped("ddp", "overlap_param_gather", False, _has_replicas),
    _overlapped("ddp", "align_param_gather", False, _align_param_gather),
    _overlapped("optimizer", "overlap_param_gather_with_optimizer_step", False),
)
"""What Megatron-Bridge's CommOverlapConfig.setup writes over other sections."""

# The tables.

_OWN = (
    # The length of a run, and its schedule.
    Derived(
        key="train.train_iters",
        sources=("train.train_samples", "train.global_batch_size"),
        value=_train_iters,
        formula="train_samples / global_batch_size",
    ),
    Derived(
        key="scheduler.lr_decay_iters",
        sources=("train.train_iters", "train.train_samples"),
        value=_lr_decay_iters,
        formula="train.train_iters; null with train_samples",
        differing=Severity.WARNING,
    ),
    Derived(
        key="scheduler.lr_warmup_iters",
        sources=("train.train_iters", "train.train_samples", "scheduler.lr_warmup_fraction"),
        value=_lr_warmup_iters,
        formula="min(2000, 5 % of train.train_iters); 0 with train_samples or lr_warmup_fraction",
    ),
    # Keys that two sections have, and upstream keeps in step.
    copied("optimizer.overlap_param_gather", "ddp.overlap_param_gather", differing=Severity.WARNING),
    _either("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp"),
    _either("dist.use_megatron_fsdp", "ddp.use_megatron_fsdp"),
    _either("rng.te_rng_tracker", "model.use_te_rng_tracker"),
    _either("model.use_te_rng_tracker", "rng.te_rng_tracker"),
    # What Megatron FSDP cannot have.
    _under_fsdp(
        "model.gradient_accumulation_fusion",
        upstream=False,
        formula="false with Megatron FSDP",
    ),
    _under_fsdp(
        "ddp.preserve_fp32_weights",
        upstream=True,
        formula="true, but with Megatron FSDP and a precision-aware optimizer",
        when=_precision_aware,
    ),
    Derived(
        key="ddp.average_in_collective",
        sources=_FSDP,
        value=lambda v: not _has_fsdp(v),
        formula="true, but with Megatron FSDP",
    ),
    # Upstream reduces the gradients of the q/k norms over TP only where the key says that there are such norms.
    Derived(
        key="model.qk_layernorm",
        sources=("model.tensor_model_parallel_size",),
        value=lambda v: v["model.tensor_model_parallel_size"] > 1,
        formula="TP > 1 needs the q/k norms' gradients reduced",
        differing=Severity.WARNING,
    ),
    # Left alone, upstream installs no handler of signals; under Slurm a run stops and saves by the clock as well.
    Derived(
        key="train.exit_signal_handler",
        sources=("launcher.kind",),
        value=lambda v: True,
        formula="launchers stop a run with a signal, on which it saves with a handler alone",
        differing=Severity.WARNING,
        alone=True,
    ),
    Derived(
        key="train.exit_duration_in_mins",
        sources=("launcher.kind", "launcher.time_limit", "launcher.stop_before"),
        value=_exit_duration_in_mins,
        formula="launcher.time_limit less launcher.stop_before: a stop by the clock, which needs no signal",
    ),
    *map(_named_precision, _PRECISION),
)
_REPLACED = {derivation.key for derivation in _OWN}
DERIVED: tuple[Derived, ...] = (
    *(derivation for derivation in SHARED if derivation.key not in _REPLACED),
    *OVERLAPS,
    *_OWN,
)
"""What DFM's targets derive: those of every target, but where DFM has its own way."""


def _eval_iters(values: Values) -> int:
    if values["data.source"] == "mock":
        return 32
    return 0


NO_EVALUATION = Derived(
    key="train.eval_iters",
    sources=("data.source",),
    value=_eval_iters,
    formula="32 with random data; 0 with real data, which WAN's and FLUX's loaders cannot evaluate on",
)


# The plan.

_NOT_UPSTREAMS = ("cluster", "launcher", "run", "data")
"""Sections that dfmspec alone reads."""


def config(values: Values) -> dict[str, Any]:
    """The override file: Megatron-Bridge's sections alone; null only where upstream would have something else."""
    # Only a plan needs the model of upstream's reading.
    from dfmspec.targets.dfm.upstream import recipe

    nested: dict[str, Any] = {}
    legal = catalogue(values["target"])
    own_data = (legal.field("dataset.path") or {}).get("x-upstream")
    upstream = recipe(values["target"], mock=values["data.source"] == "mock", dataset_path=own_data)
    for key, value in sorted(values.items()):
        section, _, field = key.rpartition(".")
        described = legal.field(key) or {}
        if not _is_read(key, described) or _is_of_the_other_dataset(key, values, described):
            continue
        written = _as_written(key, value, values)
        kept_upstream = (upstream[section] or {}).get(field)
        if written is not None or kept_upstream is not None:
            nested.setdefault(section, {})[field] = written

    # A section that the recipe leaves out needs its class's path.
    for section, path in CLASSES.items():
        if section in nested:
            nested[section].setdefault("_target_", path)
    return nested


def random_sample_tokens(values: Values) -> int:
    """Tokens of a sample of the random data: patches of a latent of F x H x W."""
    frames: int = values["dataset.F_latents"] // values["dataset.patch_temporal"]
    height: int = values["dataset.H_latents"] // values["dataset.patch_spatial"]
    width: int = values["dataset.W_latents"] // values["dataset.patch_spatial"]
    return frames * height * width


def _is_read(key: str, described: Mapping[str, Any]) -> bool:
    """Whether upstream reads a key, and keeps what it says."""
    section, dot, _ = key.rpartition(".")
    if not dot or section in _NOT_UPSTREAMS:
        return False
    # The fields of the named precision are written out one by one.
    return key != "mixed_precision.recipe" and "x-overwritten-by" not in described


def _is_of_the_other_dataset(key: str, values: Values, described: Mapping[str, Any]) -> bool:
    """Whether a field is of the class of dataset that is not in use: the random one, or the WebDataset."""
    if values["data.source"] == "mock":
        return "x-energon-only" in described or key == "dataset.path"
    return "x-mock-only" in described


def _as_written(key: str, value: Any, values: Values) -> Any:
    """A value in upstream's words: folders by environment variables, and one length of a run alone."""
    if key == "train.train_iters" and values["train.train_samples"] is not None:
        return None
    if isinstance(value, str):
        in_run_dir = value.replace(RUN_DIR, RUN_DIR_UPSTREAM)
        return in_run_dir.replace(SPEC_DIR, SPEC_DIR_UPSTREAM)
    return value


def read_back(values: Values, text: str) -> Reading:
    """What upstream's script makes of the text of config.yaml; the folders of the run stay symbols.

    Raises:
        InvalidSpec: it cannot read it.
    """
    # Only a plan needs the model of upstream's reading.
    from dfmspec.targets.dfm.upstream import read

    folders = {
        "DFMSPEC_RUN_DIR": RUN_DIR,
        "DFMSPEC_SPEC_DIR": SPEC_DIR,
    }
    try:
        return read(
            text,
            (),
            world_size=values["cluster.nnodes"] * values["cluster.nproc_per_node"],
            mock=values["data.source"] == "mock",
            environment=folders,
            target=values["target"],
        )
    except Refused as error:
        raise InvalidSpec(f"the script could not read the plan: {error}") from error


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """A config file always: upstream's defaults need their derived copies set."""
    words = ["--config-file", CONFIG]
    if values["data.source"] == "mock":
        words.append("--mock")
    return words
