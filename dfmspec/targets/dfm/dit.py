"""Target dfm: NVIDIA DFM's own script for DiT at 7cb7634."""

from __future__ import annotations

from dfmspec.estimate import dit
from dfmspec.targets import Values, Work
from dfmspec.targets.dfm import script
from dfmspec.targets.dfm.revision import upstream_of

ENTRY = "examples/megatron/recipes/dit/pretrain_dit_model.py"
UPSTREAM = upstream_of(ENTRY)
OWN = False
LAYOUTS_AGREE = False
HAS_PIPELINE = False
ENERGON = script.ENERGON
LATENT_CHANNELS = 16
TEXT_TOKENS = 512
TEXT_MULTIPLE = 64
DETERMINISTIC_ENV = script.DETERMINISTIC_ENV
SCRIPT_FLAGS = ("mock", "config_file", "debug", "dataset_path")
OWN_FILE = None
ABOUT = "NVIDIA DFM's own script; or megatron_core"
SUBJECT = f"{script.SUBJECT} for DiT"
SPEC_DATA = "dataset:\n  path: null  # the folder of your WebDataset\n  num_workers: 4\n"
SPEC_EVALUATION = "  eval_interval: 1000\n  eval_iters: 32  # 0: never evaluate\n"

DERIVED = script.DERIVED
config = script.config
arguments = script.arguments
read_back = script.read_back

_ADALN_RANK = 256
"""The rank of adaLN-LoRA in DFM's DiT, which has no key for it."""


def _shape(values: Values) -> dit.Shape:
    patch = values["model.patch_spatial"] ** 2 * values["model.patch_temporal"]
    return dit.Shape(
        num_layers=values["model.num_layers"],
        hidden_size=values["model.hidden_size"],
        ffn_hidden_size=values["model.ffn_hidden_size"],
        attention_width=values["model.kv_channels"] * values["model.num_attention_heads"],
        kv_channels=values["model.kv_channels"],
        crossattn_emb_size=values["model.crossattn_emb_size"],
        adaln_lora_rank=_ADALN_RANK,
        patch=values["model.in_channels"] * patch,
    )


def parameters(values: Values) -> int:
    """Trained parameters, within a percent."""
    return dit.parameters(_shape(values))


def work(values: Values) -> Work:
    """What training on one pack is: of random data as they are made, of others with one sample in it."""
    shape = _shape(values)
    if values["data.source"] != "mock":
        length = values["dataset.task_encoder_seq_length"]
        return Work(length, dit.flops_per_pack(shape, length, length), "one sample a pack, the most it can be")

    sample = script.random_sample_tokens(values)
    length = sample * values["dataset.number_packed_samples"]
    return Work(length, dit.flops_per_pack(shape, length, sample), f"samples of {sample:,} tokens")
