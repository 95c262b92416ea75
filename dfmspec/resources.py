"""Files that come with dfmspec: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource(name: str) -> Path:
    """The place of a shipped file, such as `schemas/manifest.schema.json`."""
    root = _PACKAGE.parent
    is_checkout = (root / "pyproject.toml").exists()
    return root / name if is_checkout else _PACKAGE / "_shipped" / name
