"""Target dfm_flux: NVIDIA DFM's script for FLUX at 7cb7634; its configuration is read as DiT's is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dfmspec.estimate import flux
from dfmspec.targets import Derived, Values, Work
from dfmspec.targets.dfm import script
from dfmspec.targets.dfm.revision import upstream_of

ENTRY = "examples/megatron/recipes/flux/pretrain_flux.py"
UPSTREAM = upstream_of(ENTRY)
OWN = False
LAYOUTS_AGREE = False
HAS_PIPELINE = False
ENERGON = script.ENERGON
LATENT_CHANNELS = 16
TEXT_TOKENS = None
TEXT_MULTIPLE = 1
DETERMINISTIC_ENV = script.DETERMINISTIC_ENV
SCRIPT_FLAGS = (
    "mock",
    "timestep_sampling",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "guidance_scale",
    "scheduler_steps",
    "config_file",
    "debug",
    "use_original_step",
    "flow_shift",
    "use_loss_weighting",
)
OWN_FILE = "conf/flux_pretrain_override_example.yaml"
ABOUT = "NVIDIA DFM's own script"
SUBJECT = f"{script.SUBJECT} for FLUX"
SPEC_DATA = script.SPEC_MOCK_DATA
SPEC_EVALUATION = ""

DERIVED: tuple[Derived, ...] = (*script.DERIVED, script.NO_EVALUATION)
config = script.config
read_back = script.read_back

_PICTURE = 1024
"""Pixels on a side of a picture, where the data do not tell."""


def arguments(values: Values, origins: Mapping[str, Any]) -> list[str]:
    """The shared arguments and the guidance strength, which the script takes from this flag and not from the model."""
    guidance = str(values["model.guidance_scale"])
    return [*script.arguments(values, origins), "--guidance-scale", guidance]


def _shape(values: Values) -> flux.Shape:
    return flux.Shape(
        num_joint_layers=values["model.num_joint_layers"],
        num_single_layers=values["model.num_single_layers"],
        hidden_size=values["model.hidden_size"],
        ffn_hidden_size=values["model.ffn_hidden_size"],
        kv_channels=values["model.kv_channels"],
        model_channels=values["model.model_channels"],
        vec_in_dim=values["model.vec_in_dim"],
        guidance_embed=values["model.guidance_embed"],
        in_channels=values["model.in_channels"],
        context_dim=values["model.context_dim"],
    )


def parameters(values: Values) -> int:
    """Trained parameters, within a percent."""
    return flux.parameters(_shape(values))


def work(values: Values) -> Work:
    """What training on one picture is, without its text."""
    height = _PICTURE
    width = _PICTURE
    if values["data.source"] == "mock":
        height = values["dataset.image_H"]
        width = values["dataset.image_W"]
    # A token is two latent pixels high and wide.
    patch = 2 * values["dataset.vae_scale_factor"]
    tokens = (height // patch) * (width // patch)
    flops = flux.flops(_shape(values), tokens)
    return Work(tokens, flops, f"pictures of {height} x {width} pixels")
