"""The engines that run a container, and which one an image has."""

from __future__ import annotations

from typing import NamedTuple


class Engine(NamedTuple):
    """An entry of ENGINES."""

    takes_files: bool
    """Whether an image may be a file."""
    bears_a_name: bool
    """Whether what runs is called by a name, and goes on when its command's process is gone."""


ENGINES = {
    "docker": Engine(takes_files=False, bears_a_name=True),
    "podman": Engine(takes_files=False, bears_a_name=True),
    "apptainer": Engine(takes_files=True, bears_a_name=False),
    "pyxis": Engine(takes_files=True, bears_a_name=False),
}
"""What a spec may name as launcher.container_engine."""


def is_file(image: str) -> bool:
    """Whether an image is a file, and not a name in a registry."""
    return image.startswith(("/", "~"))


def engine_of(kind: str, image: str | None, named: str | None) -> str | None:
    """The engine that runs an image under a launcher; None: there is no image."""
    if image is None or named is not None:
        return None if image is None else named
    if kind == "slurm":
        return "pyxis"
    return "apptainer" if is_file(image) else "docker"
