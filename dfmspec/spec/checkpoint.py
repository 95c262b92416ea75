"""`checkpoint` and `logger`: what a run leaves behind."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dfmspec.spec.base import Count, Section, derived


class Checkpoint(Section):
    """Where and how often the whole state is committed to disk."""

    save: str = derived()
    """Folder of the checkpoints; derived: ${RUN_DIR}/checkpoints."""
    load: str = derived()
    """Folder to resume from; derived: checkpoint.save."""
    pretrained_checkpoint: str | None = None
    (
        "safetensors file (dfmspec export), or folder of NVIDIA DFM's checkpoints, "
        "whose weights a new run starts from; a run that resumes has its own."
    )
    ckpt_step: Count | None = None
    """Iteration to resume from; null: the newest whole checkpoint."""
    save_interval: Count = 1000
    """Iterations between checkpoints; the last iteration is always saved."""
    async_save: bool = False
    (
        "Write checkpoints while the training goes on, from copies in host memory "
        "(18 bytes a bf16 parameter, on one rank of each data-parallel group)."
    )
    most_recent_k: Annotated[int, Field(ge=-1)] = -1
    """Checkpoints to keep, at least 2; -1: all."""


class Logger(Section):
    """What is reported while the run goes on."""

    log_interval: Count = 10
    """Iterations between console lines."""
    tensorboard_dir: str = derived()
    """Folder of the TensorBoard events; derived: ${RUN_DIR}/tensorboard."""
