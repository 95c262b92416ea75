"""Recipes: the first layer of every spec, one data file each. A new one is a file here and a word in RECIPES."""

from __future__ import annotations

from pathlib import Path

RECIPES = {
    "dit": ("dit_tiny", "dit_s", "dit_b", "dit_l", "dit_xl"),
    "dit_of_wide_heads": ("dit_xl_h128",),
    "wan": ("wan_1_3b", "wan_14b"),
    "flux": ("flux_schnell", "flux_dev"),
}
"""The recipes of each family; a target names the families that it takes."""


def recipe_text(name: str) -> bytes:
    """A recipe, as YAML."""
    return (Path(__file__).parent / f"{name}.yaml").read_bytes()
