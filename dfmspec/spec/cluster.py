"""`cluster`, `launcher` and `run`: where the experiment runs and what becomes of its files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfmspec.spec.base import NonNegativeInt, Section


class Cluster(Section):
    """The machines."""

    nnodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Nodes."""
    nproc_per_node: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Processes, one a device, on each node; derived: the fewest that hold TP x PP x CP."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cuda, or cpu over gloo for small trials and tests."""
    master_addr: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")] | None = None
    """Address of node 0; null: the launcher's choice, or the environment's MASTER_ADDR."""
    master_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of node 0; null: the launcher's choice, or the environment's MASTER_PORT."""


class Launcher(Section):
    """How the processes are started."""

    kind: Literal["local"] = "local"
    """local: torchrun on this machine; every node of the plan on this machine, for trials."""


class Run(Section):
    """The run directory and what happens around training."""

    output_dir: str = "runs"
    """Folder of the run directories: <output_dir>/<name>/<run-id>."""
    resume: str | int = "auto"
    """auto: continue the unfinished run of the same plan. require: that, or an error. never: a new run. Or an iteration, or a folder: from there."""
    num_samples: NonNegativeInt = 0
    """Pictures to sample from the final checkpoint of a run that succeeded."""
