"""Does the data keep the GPU busy? Steps of DiT-XL on a real data set beside the same steps on one microbatch that lies on the GPU.

usage: torchrun --nproc-per-node N benchmarks/data.py DATASET [key=value ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.train import Ours
from dfmspec.trainer.prefetch import Prefetch
from dfmspec.trainer.step import train_step
from dfmspec.trainer.streams import RankStreams

STEPS, WARM = 30, 10


def main() -> None:
    """Steps in turns of STEPS, three times."""
    overrides = ["data.source=webdataset", f"dataset.path={Path(sys.argv[1]).absolute()}", "dataset.num_workers=4", *sys.argv[2:]]
    ours = Ours(8192, 16, overrides)
    streams = RankStreams(ours.experiment, "train", rank=dist.get_rank() % ours.replicas, size=ours.replicas)
    batches = Prefetch(ours.experiment, streams, 0, is_saved=lambda _: False)
    first, _ = batches.take(more=True)
    seconds: dict[str, list[float]] = {"on the GPU": [], "from the data set": []}
    iteration = useful = 0
    for turn in range(4):
        for name, each in seconds.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(STEPS if turn else WARM):
                iteration += 1
                ready = first if name == "on the GPU" else batches.take(more=True)[0]
                train_step(ours.trainer, iter(ready), iteration).values(iteration)
                now = time.perf_counter()
                if turn:
                    each.append(now - began)
                    useful += int(ready[0].num_tokens) if name == "from the data set" else 0
                began = now
    if dist.get_rank() == 0:
        one, other = (statistics.median(each) for each in seconds.values())
        padding = 1 - useful / len(seconds["from the data set"]) / ours.experiment.model.seq_length
        for name, each in seconds.items():
            print(f"{name}: median {statistics.median(each) * 1e3:.1f} ms, p95 {sorted(each)[int(0.95 * len(each))] * 1e3:.1f} ms")
        print(f"ratio {other / one:.3f}; padding {padding:.1%}", flush=True)
    batches.take(more=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
