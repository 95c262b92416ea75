"""Paths in a spec: which keys hold them, what they are relative to, and where they lead on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeGuard

PATH_KEYS = frozenset(
    {
        "dataset.path",
        "checkpoint.save",
        "checkpoint.load",
        "checkpoint.pretrained_checkpoint",
        "checkpoint.non_persistent_global_ckpt_dir",
        "checkpoint.non_persistent_local_ckpt_dir",
        "logger.tensorboard_dir",
        "logger.wandb_save_dir",
        "model.vae_cache_folder",
        "run.output_dir",
    }
)
"""Keys whose relative values in a file are relative to that file."""
PLACES = (*sorted(PATH_KEYS), "run.resume")
"""Keys that may name a place on this machine."""
SPEC_DIR = "${SPEC_DIR}"
"""In a plan, the spec's folder, before every path that a person gave relative: it may be made anywhere."""
SPEC_DIR_UPSTREAM = "${oc.env:DFMSPEC_SPEC_DIR}"
"""The spec's folder, as OmegaConf fills it in on every rank."""
PLAN_ID = "DFMSPEC_PLAN_ID"
"""The variable in which a script of a plan gives its id."""
RUN_DIR = "${RUN_DIR}"
"""In a plan, the run directory, which is known when the run is launched."""
RUN_DIR_UPSTREAM = "${oc.env:DFMSPEC_RUN_DIR}"
"""The run directory, as OmegaConf fills it in on every rank."""


def in_run_dir(path: str) -> bool:
    """Whether a path of a plan begins with the run directory."""
    return path.startswith((RUN_DIR, RUN_DIR_UPSTREAM))


REMOTE = "msc"
"""The one scheme of addresses that Energon reads, by way of the Multi-Storage Client."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def scheme(text: str) -> str | None:
    """The scheme of an address, such as s3; None: the text is a path of this machine."""
    match = _ADDRESS.match(text)
    return match.group(1).lower() if match else None


def absolute(text: str) -> str:
    """A path of this machine from its root; an address as it is, to the letter."""
    if scheme(text) is not None:
        return text
    return os.path.abspath(os.path.expanduser(text))


def local_path(text: str) -> Path:
    """A path of a spec on this machine; one in the home of a user who is not there stays as it is written."""
    # pathlib's expanduser raises for such a user.
    return Path(os.path.expanduser(text))


def is_relative(path: Any) -> TypeGuard[str]:
    """Whether a value is a path that depends on a folder."""
    if not isinstance(path, str) or not path:
        return False
    # A variable is filled in later, with a whole path.
    has_root = path.startswith(("/", "~", "${"))
    return not has_root and scheme(path) is None
