"""Recipes: the first layer of every spec, one data file each. A new one is a file here and a word in RECIPES."""

from __future__ import annotations

from pathlib import Path

_DIT = ("dit_tiny", "dit_s", "dit_b", "dit_l", "dit_xl")
RECIPES = {"megatron_core": (*_DIT, "dit_xl_h128"), "dfm": _DIT, "dfm_wan": ("wan_1_3b", "wan_14b"), "dfm_flux": ("flux_schnell", "flux_dev")}
"""The recipes of each target."""
DEFAULT_RECIPE = {"megatron_core": "dit_xl", "dfm": "dit_xl", "dfm_wan": "wan_1_3b", "dfm_flux": "flux_schnell"}
"""What a spec starts from when it names no recipe."""


def recipe_text(name: str) -> bytes:
    """A recipe, as YAML."""
    return (Path(__file__).parent / f"{name}.yaml").read_bytes()
