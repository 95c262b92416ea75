"""Does the data keep the GPU busy? Steps of DiT-XL on a real data set beside the same steps on one microbatch that lies on the GPU.

usage: torchrun --nproc-per-node N benchmarks/data.py DATASET [key=value ...]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.train import Ours
from dfmspec.trainer.clock import Mark
from dfmspec.trainer.data.prefetch import Prefetch
from dfmspec.trainer.data.streams import RankStreams
from dfmspec.trainer.step import train_step

STEPS, KEPT = 30, 24


def main() -> None:
    """Steps in turns of STEPS, three times, after one turn that does not count."""
    overrides = [
        "data.source=webdataset", f"dataset.path={Path(sys.argv[1]).absolute()}", "dataset.num_workers=4", "dataset.packing_buffer_size=256", *sys.argv[2:],
    ]  # fmt: skip
    ours = Ours(8192, 16, overrides)
    streams = RankStreams(ours.experiment, "train", rank=dist.get_rank() % ours.replicas, size=ours.replicas)
    batches = Prefetch(ours.experiment, streams, 0, is_saved=lambda _: False)
    kept = cycle([batches.take(more=True)[0] for _ in range(KEPT)])
    sources: dict[str, Callable[[], Any]] = {"kept on the GPU": lambda: next(kept), "from the data set": lambda: batches.take(more=True)[0]}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    iteration = useful = 0
    for turn in range(4):
        for name, take in sources.items():
            marks, tokens = [Mark("cuda")], []
            for _ in range(STEPS):
                iteration += 1
                ready = take()
                tokens.append(ready[0].num_tokens)
                marks.append(train_step(ours.trainer, iter(ready), iteration).done)
                marks[-2].wait()  # as a run does: it reads the iteration before
            marks[-1].wait()
            if turn:
                seconds[name] += [after.seconds_since(before) for before, after in pairwise(marks)]
                useful = useful + sum(map(int, tokens)) if name == "from the data set" else useful
    if dist.get_rank() == 0:
        one, other = (statistics.median(each) for each in seconds.values())
        padding = 1 - useful / len(seconds["from the data set"]) / ours.experiment.model.seq_length
        for name, each in seconds.items():
            median, mean, p95 = (1e3 * value for value in (statistics.median(each), statistics.mean(each), sorted(each)[int(0.95 * len(each))]))
            print(f"{name}: median {median:.1f} ms, mean {mean:.1f}, p95 {p95:.1f}")
        print(f"ratio {other / one:.3f}; padding {padding:.1%}", flush=True)
    batches.take(more=False)
    ours.trainer.release_graphs()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
