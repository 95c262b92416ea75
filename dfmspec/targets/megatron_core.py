"""Target megatron_core: dfmspec's own trainer (dfmspec/trainer) on megatron-core 0.16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.data.encoders import EMBEDDED_PICTURES
from dfmspec.diagnostics import Severity
from dfmspec.estimate import dit
from dfmspec.spec.catalogue import COMPOSITION
from dfmspec.spec.resume import Resume
from dfmspec.targets import CONFIG, Derived, Values, Work
from dfmspec.targets.derivations import SHARED, copied, data_parallel_size
from dfmspec.targets.layout import LAYOUT_KEYS

ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"
UPSTREAM = None
OWN = True
LAYOUTS_AGREE = True
HAS_PIPELINE = True
ENERGON = 7
LATENT_CHANNELS = None
TEXT_TOKENS = None
TEXT_MULTIPLE = 1
DETERMINISTIC_ENV: Mapping[str, str] = {}
SCRIPT_FLAGS = ("mock", "config_file", "debug", "dataset_path")
OWN_FILE = None
ABOUT = "dfmspec's own trainer; or dfm"
SUBJECT = "dfmspec's own trainer on [Megatron-Core](https://github.com/NVIDIA/Megatron-LM)"
SPEC_DATA = (
    "data:\n"
    "  source: embedded  # drawn by dfmspec; for your own: webdataset, and dataset: {path: ...}\n"
    "  resolution: 256\n"
)
SPEC_EVALUATION = "  eval_interval: 1000\n  eval_iters: 32  # 0: never evaluate\n"

_NOT_THE_SCRIPTS = (
    "spec_version",
    "target",
    "launcher.",
    "run.",
    "cluster.nnodes",
    "cluster.nproc_per_node",
    "cluster.master_",
)
"""Beginnings of the keys that the script need not be told."""

_BUFFER = 40
"""Samples in the packing buffer: DFM's own number."""


# Derived values.


def _side(values: Values) -> Any:
    """Patches on a side of a square picture, whose latent has an eighth of its pixels on a side."""
    return values["data.resolution"] // EMBEDDED_PICTURES.compression // values["model.patch_spatial"]


def _packing_buffer(values: Values) -> int:
    """The buffer of embedded data holds whole packs, since all its samples have one size."""
    if values["data.source"] != "embedded":
        return _BUFFER
    in_a_pack: int = max(1, values["dataset.task_encoder_seq_length"] // _side(values) ** 2)
    # Rounded up to whole packs.
    return -(-_BUFFER // in_a_pack) * in_a_pack


def _embedded_path(values: Values) -> str | None:
    if values["data.source"] != "embedded":
        return None
    resolution = values["data.resolution"]
    samples = values["data.num_samples"]
    seed = values["data.seed"]
    return f"data/butterflies-{resolution}px-{samples}-seed{seed}"


def _transformer_impl(values: Values) -> str:
    """Transformer Engine runs on GPUs alone."""
    if values["cluster.device"] == "cpu":
        return "local"
    return "transformer_engine"


def _num_streams(values: Values) -> int:
    """A stream of samples for each loader process of each replica."""
    replicas = data_parallel_size(values)
    workers: int = max(1, values["dataset.num_workers"])
    return replicas * workers


def _has_a_ramp(values: Values) -> bool:
    return bool(values["scheduler.start_weight_decay"] != values["scheduler.end_weight_decay"])


def _judged_here(derivation: Derived) -> Derived:
    """A derivation of all targets, with what another value is for this one, whose schedule takes any weight decay."""
    if derivation.key in ("scheduler.start_weight_decay", "scheduler.end_weight_decay"):
        return derivation._replace(differing=Severity.WARNING, meant=_has_a_ramp)
    return derivation


DERIVED: tuple[Derived, ...] = (
    *map(_judged_here, SHARED),
    # One key says how long a pack is, and the model follows the data.
    copied(
        "model.seq_length",
        "dataset.task_encoder_seq_length",
        differing=Severity.ERROR,
        alone=True,
    ),
    # What the device can do.
    Derived(
        key="model.transformer_impl",
        sources=("cluster.device",),
        value=_transformer_impl,
        formula="cluster.device",
    ),
    Derived(
        key="mixed_precision.bf16",
        sources=("cluster.device",),
        value=lambda v: v["cluster.device"] == "cuda",
        formula="cluster.device",
    ),
    # The data.
    Derived(
        key="data.num_streams",
        sources=("dataset.num_workers", *LAYOUT_KEYS),
        value=_num_streams,
        formula="the data-parallel size x max(1, num_workers)",
    ),
    Derived(
        key="dataset.packing_buffer_size",
        sources=("data.source", "data.resolution", "model.patch_spatial", "dataset.task_encoder_seq_length"),
        value=_packing_buffer,
        formula="40, or as many more as make whole packs",
    ),
    Derived(
        key="dataset.path",
        sources=("data.source", "data.resolution", "data.num_samples", "data.seed"),
        value=_embedded_path,
        formula="the embedded data",
    ),
)


# The plan.


def config(values: Values) -> dict[str, Any]:
    """The whole configuration: the trainer fills in nothing."""
    nested: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        # The spec's own composition, and what the launcher alone reads.
        if key in COMPOSITION or key.startswith(("launcher.", "run.")):
            continue
        section, dot, field = key.rpartition(".")
        if dot:
            nested.setdefault(section, {})[field] = value
        else:
            nested[key] = value
    return nested


def read_back(values: Values, text: str) -> None:
    """None: the loader that made the configuration reads it back."""
    return


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """`--dataset-path P` when a spec sets nothing else that the script must know; else the config file."""
    told = set()
    for key, origin in origins.items():
        if origin.is_set_by_user and not key.startswith(_NOT_THE_SCRIPTS):
            told.add(key)

    # A checkpoint to resume from is written into the config file at launch.
    names_a_checkpoint = Resume.parse(values["run.resume"]).source is not None
    if told == {"dataset.path"} and not names_a_checkpoint:
        return ["--dataset-path", values["dataset.path"]]
    return ["--config-file", CONFIG]


# Its size.


def _shape(values: Values) -> dit.Shape:
    patch = values["model.patch_spatial"] ** 2 * values["model.patch_temporal"]
    return dit.Shape(
        num_layers=values["model.num_layers"],
        hidden_size=values["model.hidden_size"],
        ffn_hidden_size=values["model.ffn_hidden_size"],
        attention_width=values["model.kv_channels"] * values["model.num_attention_heads"],
        kv_channels=values["model.kv_channels"],
        crossattn_emb_size=values["model.crossattn_emb_size"],
        adaln_lora_rank=values["model.adaln_lora_rank"],
        patch=values["model.in_channels"] * patch,
    )


def parameters(values: Values) -> int:
    """Trained parameters of the network, exact."""
    return dit.parameters(_shape(values))


def work(values: Values) -> Work:
    """What training on one pack is, full of samples of the size that the data source tells, else with one in it."""
    shape = _shape(values)
    length = values["dataset.task_encoder_seq_length"]

    # The sizes of a WebDataset's samples are not known here.
    if values["data.source"] == "webdataset":
        flops = dit.flops_per_pack(shape, length, length)
        return Work(length, flops, "one sample a pack, the most it can be")

    tokens = min(length, _side(values) ** 2)
    flops = dit.flops_per_pack(shape, length, tokens)
    return Work(length, flops, f"samples of {tokens} tokens")
