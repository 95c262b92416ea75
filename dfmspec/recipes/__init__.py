"""Recipes: the first layer of every spec, one data file each. A new one is a file here and a line in RECIPES."""

from __future__ import annotations

from pathlib import Path

RECIPES = {name: Path(__file__).parent / f"{name}.yaml" for name in ("dit_tiny", "dit_s", "dit_b", "dit_l", "dit_xl")}
