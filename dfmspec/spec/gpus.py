"""What is known of a GPU model by name: what it can compute, how many a machine has, and how far its NVLink reaches."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A model of NVIDIA's."""

    capability: int
    """CUDA compute capability, times ten."""
    per_node: int
    """The most that one machine of NVIDIA's own designs has: a board of HGX, or a tray of an NVL72 rack."""
    nvlink_domain: int
    """GPUs that NVLink joins: those of a machine, or of a rack."""
    machine: str
    """That machine, by name."""


GPUS = {
    "a100": Gpu(80, 16, 16, "HGX A100"),
    "h100": Gpu(90, 8, 8, "HGX H100"),
    "h200": Gpu(90, 8, 8, "HGX H200"),
    "b200": Gpu(100, 8, 8, "HGX B200"),
    "b300": Gpu(103, 8, 8, "HGX B300"),
    "gb200": Gpu(100, 4, 72, "a tray of GB200 NVL72"),
    "gb300": Gpu(103, 4, 72, "a tray of GB300 NVL72"),
}
"""The values of `cluster.gpu`. Sources: CUDA's table of compute capabilities; NVIDIA's pages of HGX and of NVL72."""
