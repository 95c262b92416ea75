"""Target dfm_wan: NVIDIA DFM's script for WAN at 7cb7634; its configuration is read as DiT's is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.estimate import wan
from dfmspec.targets import Derived, Values, Work
from dfmspec.targets.derivations import fixed
from dfmspec.targets.dfm import script
from dfmspec.targets.dfm.revision import upstream_of

ENTRY = "examples/megatron/recipes/wan/pretrain_wan.py"
UPSTREAM = upstream_of(ENTRY)
OWN = False
LAYOUTS_AGREE = False
HAS_PIPELINE = False
ENERGON = script.ENERGON
LATENT_CHANNELS = 16
TEXT_TOKENS = None
TEXT_MULTIPLE = 1
DETERMINISTIC_ENV = script.DETERMINISTIC_ENV
SCRIPT_FLAGS = ("mock", "training_mode", "config_file", "debug")
OWN_FILE = None
ABOUT = "NVIDIA DFM's own script"
SUBJECT = f"{script.SUBJECT} for WAN"
SPEC_DATA = script.SPEC_MOCK_DATA
SPEC_EVALUATION = ""

_PACKING_BUFFER = 150
"""Samples in the packing buffer: upstream's own number."""


def _packing_buffer(values: Values) -> int | None:
    if values["data.source"] == "mock":
        return None
    return _PACKING_BUFFER


_QK_LAYERNORM = fixed(
    "model.qk_layernorm",
    False,
    "WAN's norms span the heads: each rank has their whole gradient",
)
DERIVED: tuple[Derived, ...] = (
    *(derivation for derivation in script.DERIVED if derivation.key != _QK_LAYERNORM.key),
    script.NO_EVALUATION,
    _QK_LAYERNORM,
    Derived(
        key="dataset.packing_buffer_size",
        sources=("data.source",),
        value=_packing_buffer,
        formula="150; none for random data, which come packed",
    ),
)
config = script.config
read_back = script.read_back


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """The shared arguments after the training mode, which the script takes to be finetuning without it."""
    return ["--training-mode", "pretrain", *script.arguments(values, origins)]


def _shape(values: Values) -> wan.Shape:
    return wan.Shape(
        num_layers=values["model.num_layers"],
        hidden_size=values["model.hidden_size"],
        ffn_hidden_size=values["model.ffn_hidden_size"],
        crossattn_emb_size=values["model.crossattn_emb_size"],
        text_dim=values["model.text_dim"],
        freq_dim=values["model.freq_dim"],
        in_channels=values["model.in_channels"],
        out_channels=values["model.out_channels"],
        patch=values["model.patch_spatial"] ** 2 * values["model.patch_temporal"],
    )


def parameters(values: Values) -> int:
    """Trained parameters, within a percent."""
    return wan.parameters(_shape(values))


def work(values: Values) -> Work:
    """What training on one pack is: of random data as they are made, of others with one sample in it."""
    shape = _shape(values)
    # The sizes of a WebDataset's samples are not known here.
    if values["data.source"] != "mock":
        sample = values["dataset.seq_length"]
        return Work(sample, wan.flops(shape, sample), "one sample a pack, the most it can be")

    sample = script.random_sample_tokens(values)
    samples = values["dataset.number_packed_samples"]
    flops = samples * wan.flops(shape, sample)
    return Work(samples * sample, flops, f"samples of {sample:,} tokens")
