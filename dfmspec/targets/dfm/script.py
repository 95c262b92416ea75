"""What NVIDIA DFM's three scripts share at 7cb7634: derived values, the override file, the arguments.

A script reads one override file and knows nothing of dfmspec. Upstream keeps copies of derived values that it never
recomputes, so every one is written out; a section that it skips in silence is never emitted. See docs/deviations.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from dfmspec.diagnostics import Severity
from dfmspec.spec.paths import SPEC_DIR, SPEC_DIR_UPSTREAM
from dfmspec.targets import CONFIG, Derived, Reading, Values, catalogue, minutes_of
from dfmspec.targets.derivations import SHARED
from dfmspec.targets.dfm.bridge import BRIDGE_PRECISION, CLASSES, PRECISIONS
from dfmspec.targets.layout import layout_of

_PRECISION = BRIDGE_PRECISION | {"grad_reduce_in_fp32": False}
"""The same with DFM's own choice, which the recipe makes for bf16_mixed and a name would lose."""


def _of_recipe(field: str) -> Derived:
    def value(values: Values) -> Any:
        return PRECISIONS.get(values["mixed_precision.recipe"], {}).get(field, _PRECISION[field])

    return Derived(f"mixed_precision.{field}", ("mixed_precision.recipe",), value, "mixed_precision.recipe")


def _warmup(values: Values) -> int:
    by_iterations = values["train.train_samples"] is None and values["scheduler.lr_warmup_fraction"] is None
    return min(2000, values["train.train_iters"] // 20) if by_iterations else 0


def _until_the_limit(values: Values) -> int | None:
    limit = values["launcher.time_limit"]
    return math.ceil(minutes_of(limit) - values["launcher.stop_before"] / 60) if limit and values["launcher.kind"] == "slurm" else None


_FSDP = ("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp")
_RNG = ("rng.te_rng_tracker", "model.use_te_rng_tracker")


def _either(pair: tuple[str, str], key: str) -> Derived:
    """One of two keys of which upstream turns on both when one is on."""
    other = next(each for each in pair if each != key)
    return Derived(key, (other,), lambda v: bool(v[key] or v[other]), other, Severity.ERROR, alone=True)


def _under_fsdp(key: str, upstream: bool, words: str, when: Callable[[Values], bool] = lambda v: True) -> Derived:
    """A key that upstream turns off under Megatron FSDP."""

    def value(v: Values) -> bool:
        off = (v[_FSDP[0]] or v[_FSDP[1]]) and when(v)
        return bool(not off and (upstream if v[key] is None else v[key]))

    return Derived(key, _FSDP, value, words, Severity.ERROR, alone=True)


_OVERLAP_FIELDS = tuple(f"comm_overlap.{name}" for name in catalogue("dfm").fields("comm_overlap"))


def _overlapped(section: str, name: str, upstream: Any, default: Callable[[Values], Any] = lambda v: False) -> Derived:
    """A key that a comm_overlap section overwrites, with its own value or its own default."""
    key, twin = f"{section}.{name}", f"comm_overlap.{name}"

    def value(v: Values) -> Any:
        if all(v[field] is None for field in _OVERLAP_FIELDS) or (section != "model" and not v["ddp.use_distributed_optimizer"]):
            return upstream if v[key] is None else v[key]
        chosen = default(v) if v.get(twin) is None else v[twin]
        return chosen and _splits_sequences(v) if name == "tp_comm_overlap" else chosen

    return Derived(key, (twin, "comm_overlap.tp_comm_overlap"), value, f"{twin}, or its default when there is a comm_overlap section")


def _splits_sequences(v: Values) -> bool:
    return bool(v["model.tensor_model_parallel_size"] > 1 and v["model.sequence_parallel"])


def _several(v: Values) -> bool:
    return layout_of(v).data_parallel_size > 1


def _chunks(v: Values) -> bool | None:
    """Whether pipeline stages have several chunks; None: there is one stage."""
    return (v["model.virtual_pipeline_model_parallel_size"] or 1) > 1 if v["model.pipeline_model_parallel_size"] > 1 else None


OVERLAPS: tuple[Derived, ...] = (
    _overlapped("model", "tp_comm_overlap", False),
    _overlapped("model", "defer_embedding_wgrad_compute", False),
    _overlapped("model", "overlap_moe_expert_parallel_comm", False),
    _overlapped("model", "delay_wgrad_compute", False),
    _overlapped("model", "wgrad_deferral_limit", 0, lambda v: -1),
    _overlapped("model", "overlap_p2p_comm", False, lambda v: _chunks(v) is True),
    _overlapped("model", "batch_p2p_comm", True, lambda v: _chunks(v) is False),
    _overlapped("ddp", "bucket_size", None, lambda v: 128 * 2**20 if _several(v) else None),
    *(_overlapped("ddp", name, False, _several) for name in ("overlap_grad_reduce", "overlap_param_gather")),
    _overlapped("ddp", "align_param_gather", False, lambda v: _several(v) and _chunks(v) is True),
    _overlapped("optimizer", "overlap_param_gather_with_optimizer_step", False),
)
"""What Megatron-Bridge's CommOverlapConfig.setup writes over other sections."""

_OWN = (
    Derived("train.train_iters", ("train.train_samples", "train.global_batch_size"),
            lambda v: None if v["train.train_samples"] is None else v["train.train_samples"] // v["train.global_batch_size"],
            "train_samples / global_batch_size"),
    Derived("scheduler.lr_decay_iters", ("train.train_iters", "train.train_samples"),
            lambda v: v["train.train_iters"] if v["train.train_samples"] is None else None, "train.train_iters; null with train_samples", Severity.WARNING),
    Derived("scheduler.lr_warmup_iters", ("train.train_iters", "train.train_samples", "scheduler.lr_warmup_fraction"), _warmup,
            "min(2000, 5 % of train.train_iters); 0 with train_samples or lr_warmup_fraction"),
    Derived("optimizer.overlap_param_gather", ("ddp.overlap_param_gather",), lambda v: v["ddp.overlap_param_gather"],
            "ddp.overlap_param_gather", Severity.WARNING),
    *(_either(_FSDP, key) for key in _FSDP),
    *(_either(_RNG, key) for key in _RNG),
    _under_fsdp("model.gradient_accumulation_fusion", False, "false with Megatron FSDP"),
    _under_fsdp("ddp.preserve_fp32_weights", True, "true, but with Megatron FSDP and a precision-aware optimizer",
                lambda v: bool(v["optimizer.use_precision_aware_optimizer"])),
    Derived("ddp.average_in_collective", ("ddp.use_megatron_fsdp", "dist.use_megatron_fsdp"),
            lambda v: not (v["ddp.use_megatron_fsdp"] or v["dist.use_megatron_fsdp"]), "true, but with Megatron FSDP"),
    Derived("model.qk_layernorm", ("model.tensor_model_parallel_size",), lambda v: v["model.tensor_model_parallel_size"] > 1,
            "TP > 1 needs the q/k norms' gradients reduced", Severity.WARNING),
    Derived("train.exit_duration_in_mins", ("launcher.kind", "launcher.time_limit", "launcher.stop_before"), _until_the_limit,
            "launcher.time_limit less launcher.stop_before: the only stop that saves upstream"),
    *map(_of_recipe, _PRECISION),
)  # fmt: skip
_REPLACED = {derivation.key for derivation in _OWN}
DERIVED: tuple[Derived, ...] = (*(derivation for derivation in SHARED if derivation.key not in _REPLACED), *OVERLAPS, *_OWN)
NO_EVALUATION = Derived("train.eval_iters", ("data.source",), lambda v: 32 if v["data.source"] == "mock" else 0,
                        "32 with random data; 0 with real data, which WAN's and FLUX's loaders cannot evaluate on")  # fmt: skip
_NOT_UPSTREAMS = ("cluster", "launcher", "run", "data")
"""Sections that dfmspec alone reads."""

CHECKOUT = "${DFM_ROOT:-/opt/DFM}"
SPEC_MOCK_DATA = (
    "data:\n"
    "  source: mock  # random data, for a trial; for your own: webdataset, and dataset: {path: ...}\n"
)
ENERGON = 6
DETERMINISTIC_ENV = {"NCCL_ALGO": "Ring", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


def config(values: Values) -> dict[str, Any]:
    """The override file: Megatron-Bridge's sections alone; null only where upstream would have something else."""
    nested: dict[str, Any] = {}
    legal = catalogue(values["target"])
    for key, value in sorted(values.items()):
        section, dot, field = key.rpartition(".")
        described = legal.field(key) or {}
        if not dot or section in _NOT_UPSTREAMS or key == "mixed_precision.recipe" or "x-overwritten-by" in described:
            continue
        if _is_of_the_other_dataset(key, values, described):
            continue
        if key == "train.train_iters" and values["train.train_samples"] is not None:
            value = None  # noqa: PLW2901  upstream computes it, and refuses both
        if isinstance(value, str):
            value = value.replace("${RUN_DIR}", "${oc.env:DFMSPEC_RUN_DIR}").replace(SPEC_DIR, SPEC_DIR_UPSTREAM)  # noqa: PLW2901
        if value is not None or described.get("x-upstream", described.get("default")) is not None:
            nested.setdefault(section, {})[field] = value
    for section in CLASSES.keys() & nested.keys():
        nested[section].setdefault("_target_", CLASSES[section])
    return nested


def _is_of_the_other_dataset(key: str, values: Values, described: Mapping[str, Any]) -> bool:
    """The random dataset and the WebDataset are two classes, and each has fields of its own."""
    mock = values["data.source"] == "mock"
    return ("x-mock-only" in described and not mock) or (mock and ("x-energon-only" in described or key == "dataset.path"))


def read_back(values: Values, text: str) -> Reading:
    """By the model of upstream's reading; the folders of the run stay symbols."""
    from dfmspec.targets.dfm.upstream import read

    world_size, folders = values["cluster.nnodes"] * values["cluster.nproc_per_node"], {"DFMSPEC_RUN_DIR": "${RUN_DIR}", "DFMSPEC_SPEC_DIR": SPEC_DIR}
    return read(text, (), world_size=world_size, mock=values["data.source"] == "mock", environment=folders, target=values["target"])


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """A config file always: upstream's defaults need their derived copies set."""
    return ["--config-file", CONFIG, *(["--mock"] if values["data.source"] == "mock" else [])]
