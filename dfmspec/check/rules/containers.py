"""Containers: an image that is one image, an engine that can run it, and what is mounted."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator

from dfmspec.check.rules.base import ERROR, WARNING, Rule, View, excludes, path
from dfmspec.check.rules.launchers import KIND
from dfmspec.diagnostics import Finding
from dfmspec.spec.containers import ENGINES, engine_of, is_file
from dfmspec.spec.paths import local_path

IMAGE = "launcher.container"
_ENGINE = "launcher.container_engine"
_MOUNTS = "launcher.container_mounts"
_OF_A_CONTAINER = (_ENGINE, _MOUNTS, "launcher.container_options")
_BY_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


def _engine(view: View) -> str:
    """The engine of a container, which is there."""
    return str(engine_of(view[KIND], view[IMAGE], view.or_null(_ENGINE)))


def _is_loose(view: View) -> bool:
    return not is_file(view[IMAGE]) and _BY_DIGEST.fullmatch(view[IMAGE]) is None


def _unfit(view: View) -> Iterator[Finding]:
    image = view[IMAGE]
    kind = view[KIND]
    if kind == "kubernetes":
        yield Finding(path(IMAGE), "pods have launcher.image for their container", "name it there")
        return
    engine = _engine(view)
    key = path(view.key_set_by_user(_ENGINE, otherwise=IMAGE))
    if engine == "pyxis" and kind != "slurm":
        yield Finding(key, f"pyxis is a part of Slurm, and the launcher is {kind}", "docker, podman or apptainer")
    elif is_file(image) and not ENGINES[engine].takes_files:
        yield Finding(key, f"{engine} takes no file of an image, such as {image}", "apptainer; or pyxis under Slurm")


def _unused(view: View) -> Iterator[Finding]:
    if view.or_null(IMAGE) is not None:
        return
    for key in _OF_A_CONTAINER:
        if view.is_set_by_user(key) and view.or_null(key) not in (None, []):
            yield Finding(path(key), f"{key} has no container to be for", f"set {IMAGE}, or remove it")


def _not_there(view: View) -> Iterator[Finding]:
    if view[KIND] != "local":  # other machines have other disks
        return
    image = view[IMAGE]
    if is_file(image) and not local_path(image).is_file():
        yield Finding(path(IMAGE), f"there is no file {image}", "check the path")
    for index, mount in enumerate(view[_MOUNTS]):
        source = mount.partition(":")[0]
        if not os.path.exists(source):  # noqa: PTH110  which a name too long does not stop
            yield Finding(
                (*path(_MOUNTS), index), f"{source}, which is to be mounted, is not there", "check the path, or make it"
            )


RULES = (
    Rule(
        "RUN125",
        "image-without-digest",
        ERROR,
        excludes(
            _is_loose,
            at=IMAGE,
            message=lambda v: f"{v[IMAGE]} is whatever image bears that name on the day of the run",
            hint=lambda v: (
                "name it by digest, NAME@sha256:..., which this prints: "
                f"skopeo inspect --format '{{{{.Digest}}}}' docker://{shlex.quote(v[IMAGE])}"
            ),
        ),
        "Nobody can tell which code trained, and a run that goes on may go on with other code.",
        "dfmspec's launchers",
    ),
    Rule(
        "RUN126",
        "engine-cannot-run-image",
        ERROR,
        _unfit,
        "The engine refuses it, once the nodes are there.",
        "docker, podman, apptainer and pyxis",
    ),
    Rule(
        "RUN127",
        "key-without-container",
        WARNING,
        _unused,
        "It is not read.",
        "dfmspec's launchers",
    ),
    Rule(
        "RUN128",
        "image-or-mount-not-there",
        ERROR,
        _not_there,
        "The engine fails, or mounts an empty folder that it makes itself.",
        "docker, podman and apptainer",
        level="paths",
    ),
)
