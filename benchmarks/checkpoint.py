"""Checkpoints of DiT-XL: how long the training stands still, how long until one is committed, its size, and loading.

usage: torchrun --nproc-per-node N benchmarks/checkpoint.py FOLDER [key=value ...]
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dfmspec.record import checkpoints

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.train import Ours
from dfmspec.trainer.checkpoint import writer as checkpoint
from dfmspec.trainer.data.streams import RankStreams


def main() -> None:
    """Three saves in each way, with steps in between, then one load."""
    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    ours = Ours(8192, 16, ["checkpoint.async_save=true", *overrides])
    batch = ours.batch([(1, 32, 32)] * 8)
    streams = RankStreams(ours.experiment, "train", rank=dist.get_rank() % ours.replicas, size=ours.replicas)
    gc.freeze()  # as a run does
    for beside in (False, True):
        save = ours.experiment.checkpoint.model_copy(update={"async_save": beside})
        ours.trainer.experiment = ours.experiment.model_copy(update={"checkpoint": save})
        writer = checkpoint.Writer(ours.trainer, folder / str(beside), {"data": {"num_streams": ours.experiment.data.num_streams}}, "")
        for iteration in range(1, 4):
            for _ in range(50):  # between two saves, as in a run
                ours.step(batch)
            torch.cuda.synchronize()
            began = time.perf_counter()
            writing = writer.save(streams.states(), iteration)
            blocked, steps = time.perf_counter() - began, 0
            while beside and not writing.done():
                ours.step(batch)
                torch.cuda.synchronize()
                steps += 1
            path = writing.result()
            seconds = time.perf_counter() - began
            if dist.get_rank() == 0:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                how = f"asynchronous: stood still {blocked:.2f} s, {steps} steps meanwhile," if beside else "synchronous:"
                print(f"{how} committed after {seconds:.2f} s, {size / 2**30:.2f} GiB, {size / seconds / 2**30:.2f} GiB/s", flush=True)
    began = time.perf_counter()
    checkpoints.find(path.parent, iteration=3, report=print)
    checked = time.perf_counter() - began
    checkpoint.load(ours.trainer, streams, path)
    torch.cuda.synchronize()
    if dist.get_rank() == 0:
        print(f"checked in {checked:.2f} s, loaded in {time.perf_counter() - began - checked:.2f} s", flush=True)
    ours.trainer.release_graphs()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
