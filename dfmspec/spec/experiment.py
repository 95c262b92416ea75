"""The whole spec: every section, as one model. Its JSON Schema is what `load` checks a file against."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dfmspec.spec.base import Section
from dfmspec.spec.checkpoint import Checkpoint, Logger
from dfmspec.spec.cluster import Cluster, Launcher, Run
from dfmspec.spec.data import Data, Dataset
from dfmspec.spec.model import Diffusion, Model
from dfmspec.spec.training import Ddp, Dist, MixedPrecision, Optimizer, Rng, Scheduler, Train


class Experiment(Section):
    """An experiment for target megatron_core."""

    spec_version: Literal[1] = 1
    """Version of this format."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = Field(
        default=None, json_schema_extra={"x-null": "derived"}
    )
    """Name of the experiment, a word for folders; derived: the stem of the spec's file name."""
    recipe: str = "dit_xl"
    """The defaults to start from."""
    target: str = "megatron_core"
    """What trains: dfmspec's own trainer, or NVIDIA DFM's script at its pinned revision for DiT, WAN or FLUX."""
    cluster: Cluster = Cluster()
    launcher: Launcher = Launcher()
    run: Run = Run()
    data: Data = Data()
    dataset: Dataset = Dataset()
    model: Model = Model()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    scheduler: Scheduler = Scheduler()
    ddp: Ddp = Ddp()
    mixed_precision: MixedPrecision = MixedPrecision()
    checkpoint: Checkpoint = Checkpoint()
    logger: Logger = Logger()
    rng: Rng = Rng()
    dist: Dist = Dist()
