"""Checkpoints of DiT-XL: how long the training stands still, how long until one is committed, its size, and loading.

usage: torchrun --nproc-per-node N benchmarks/checkpoint.py FOLDER [key=value ...]
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.ours import Ours
from dfmspec.record import checkpoints
from dfmspec.record.progress import Identity
from dfmspec.trainer.checkpoint import writer as checkpoint
from dfmspec.trainer.data.streams import RankStreams

SAVES = 3
STEPS_BETWEEN = 50


def main() -> None:
    """Three saves in each way, with steps in between, then one load."""
    folder = Path(sys.argv[1])
    overrides = sys.argv[2:]
    ours = Ours(8192, 16, ["checkpoint.async_save=true", *overrides])
    batch = ours.batch([(1, 32, 32)] * 8)
    streams = RankStreams(ours.experiment, "train", rank=dist.get_rank() % ours.replicas, size=ours.replicas)
    # As a run does.
    gc.freeze()

    for is_async in (False, True):
        writer = _writer(ours, folder / str(is_async), is_async)
        for iteration in range(1, SAVES + 1):
            path = save(ours, batch, writer, streams, iteration, is_async)
    load(ours, streams, path)
    ours.trainer.release_graphs()
    dist.destroy_process_group()


def _writer(ours: Ours, folder: Path, is_async: bool) -> checkpoint.Writer:
    own = ours.experiment.checkpoint.model_copy(update={"async_save": is_async})
    ours.trainer.experiment = ours.experiment.model_copy(update={"checkpoint": own})
    # The configuration goes into the checkpoint's manifest, where loading looks for the network.
    config = ours.experiment.model_dump(mode="json")
    return checkpoint.Writer(ours.trainer, folder, Identity(config, None))


def save(
    ours: Ours,
    batch: Any,
    writer: checkpoint.Writer,
    streams: RankStreams,
    iteration: int,
    is_async: bool,
) -> Path:
    """Save once, after steps as in a run, and print how long it took; the checkpoint's folder."""
    for _ in range(STEPS_BETWEEN):
        ours.step(batch)
    torch.cuda.synchronize()

    # Until the training goes on, then until the checkpoint is committed.
    began = time.perf_counter()
    writing = writer.save(streams.states(), iteration)
    blocked = time.perf_counter() - began
    steps = 0
    while is_async and not writing.done():
        ours.step(batch)
        torch.cuda.synchronize()
        steps += 1
    path = writing.result()
    seconds = time.perf_counter() - began

    if dist.get_rank() == 0:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        how = "synchronous:"
        if is_async:
            how = f"asynchronous: stood still {blocked:.2f} s, {steps} steps meanwhile,"
        gib = size / 2**30
        rate = size / seconds / 2**30
        print(f"{how} committed after {seconds:.2f} s, {gib:.2f} GiB, {rate:.2f} GiB/s", flush=True)
    return path


def load(ours: Ours, streams: RankStreams, path: Path) -> None:
    """Check a checkpoint and load it, as a run that resumes does."""
    began = time.perf_counter()
    checkpoints.find(path.parent, iteration=SAVES, report=print)
    checked = time.perf_counter() - began
    checkpoint.load(ours.trainer, streams, path)
    torch.cuda.synchronize()
    if dist.get_rank() == 0:
        loaded = time.perf_counter() - began - checked
        print(f"checked in {checked:.2f} s, loaded in {loaded:.2f} s", flush=True)


if __name__ == "__main__":
    main()
