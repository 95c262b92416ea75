"""Target megatron_core: dfmspec's own trainer (dfmspec/trainer) on megatron-core 0.16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.diagnostics import Severity
from dfmspec.estimate import dit
from dfmspec.targets import CONFIG, Derived, Values, Work
from dfmspec.targets.derivations import SHARED, data_parallel_size
from dfmspec.targets.layout import LAYOUT_KEYS

ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"
CHECKOUT = None
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
SPEC_DATA = (
    "data:\n"
    "  source: embedded  # drawn by dfmspec; for your own: webdataset, and dataset: {path: ...}\n"
    "  resolution: 256\n"
)
SPEC_EVALUATION = "  eval_interval: 1000\n  eval_iters: 32  # 0: never evaluate\n"

_NOT_THE_SCRIPTS = ("spec_version", "target", "launcher.", "run.", "cluster.nnodes", "cluster.nproc_per_node", "cluster.master_")










def _packing_buffer(values: Values) -> int:
    if values["data.source"] != "embedded":
        return _BUFFER
    in_a_pack: int = max(1, values["dataset.task_encoder_seq_length"] // (values["data.resolution"] // 8 // values["model.patch_spatial"]) ** 2)
    return -(-_BUFFER // in_a_pack) * in_a_pack


_BUFFER = 40
"""DFM's own."""


def _embedded_path(values: Values) -> str | None:
    if values["data.source"] != "embedded":
        return None
    return f"data/butterflies-{values['data.resolution']}px-{values['data.num_samples']}-seed{values['data.seed']}"


def _has_a_ramp(values: Values) -> bool:
    return bool(values["scheduler.start_weight_decay"] != values["scheduler.end_weight_decay"])


def _as_here(derivation: Derived) -> Derived:
    """A derivation that every target makes, as this one judges another value: its schedule takes any weight decay."""
    if derivation.key in ("scheduler.start_weight_decay", "scheduler.end_weight_decay"):
        return derivation._replace(differing=Severity.WARNING, meant=_has_a_ramp)
    return derivation


DERIVED: tuple[Derived, ...] = (
    *map(_as_here, SHARED),
    Derived("model.seq_length", ("dataset.task_encoder_seq_length",), lambda v: v["dataset.task_encoder_seq_length"],
            "dataset.task_encoder_seq_length", Severity.ERROR, alone=True),
    Derived("model.transformer_impl", ("cluster.device",),
            lambda v: "local" if v["cluster.device"] == "cpu" else "transformer_engine", "cluster.device"),
    Derived("mixed_precision.bf16", ("cluster.device",), lambda v: v["cluster.device"] == "cuda", "cluster.device"),
    Derived("data.num_streams", ("dataset.num_workers", *LAYOUT_KEYS),
            lambda v: data_parallel_size(v) * max(1, v["dataset.num_workers"]), "the data-parallel size x max(1, num_workers)"),
    Derived("dataset.packing_buffer_size", ("data.source", "data.resolution", "model.patch_spatial", "dataset.task_encoder_seq_length"), _packing_buffer,
            "40, or as many more as make whole packs"),
    Derived("dataset.path", ("data.source", "data.resolution", "data.num_samples", "data.seed"), _embedded_path, "the embedded data"),
)  # fmt: skip


def config(values: Values) -> dict[str, Any]:
    """The whole configuration: the trainer fills in nothing."""
    nested: dict[str, Any] = {}
    for key, value in sorted(values.items()):
        section, dot, field = key.rpartition(".")
        if key in ("extends", "config_file") or key.startswith(("launcher.", "run.")):  # the launcher's business
            continue
        if dot:
            nested.setdefault(section, {})[field] = value
        else:
            nested[key] = value
    return nested


def read_back(values: Values, text: str) -> None:
    """By the loader that made it."""
    return


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """`--dataset-path P` when a spec sets nothing else that the script must know; else the config file."""
    told = {key for key, origin in origins.items() if origin.is_users and not key.startswith(_NOT_THE_SCRIPTS)}
    resumes_from = values["run.resume"] not in ("auto", "require", "never")  # written into the config file at launch
    return ["--dataset-path", values["dataset.path"]] if told == {"dataset.path"} and not resumes_from else ["--config-file", CONFIG]


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
    if values["data.source"] == "webdataset":
        return Work(length, dit.flops_per_pack(shape, length, length), "one sample a pack, the most it can be")
    side = values["data.resolution"] // 8 // values["model.patch_spatial"]
    tokens = min(length, side**2)
    return Work(length, dit.flops_per_pack(shape, length, tokens), f"samples of {tokens} tokens")
