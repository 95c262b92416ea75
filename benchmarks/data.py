"""Does the data keep the GPU busy? DiT-XL on a data set beside the same steps on microbatches that lie on the GPU.

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
from benchmarks.ours import Ours
from dfmspec.trainer.clock import Mark
from dfmspec.trainer.data.prefetch import Prefetch
from dfmspec.trainer.data.streams import RankStreams
from dfmspec.trainer.step import train_step

TURNS = 4
STEPS = 30
KEPT = 24
"""Microbatches that lie on the GPU."""
ON_GPU = "kept on the GPU"
FROM_DATA = "from the data set"


def main() -> None:
    """Steps in turns of STEPS, three times, after one turn that does not count."""
    path = Path(sys.argv[1]).absolute()
    overrides = [
        "data.source=webdataset",
        f"dataset.path={path}",
        "dataset.num_workers=4",
        "dataset.packing_buffer_size=256",
        *sys.argv[2:],
    ]
    ours = Ours(8192, 16, overrides)
    streams = RankStreams(ours.experiment, "train", rank=dist.get_rank() % ours.replicas, size=ours.replicas)
    batches = Prefetch(ours.experiment, streams, 0, is_saved=lambda _: False)
    kept = cycle([batches.take(more=True)[0] for _ in range(KEPT)])
    sources: dict[str, Callable[[], Any]] = {
        ON_GPU: lambda: next(kept),
        FROM_DATA: lambda: batches.take(more=True)[0],
    }

    # Both sources in turns; the first turn warms up.
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    iteration = 0
    useful = 0
    for turn in range(TURNS):
        for name, take in sources.items():
            each, tokens = one_turn(ours, take, iteration)
            iteration += STEPS
            if turn > 0:
                seconds[name] += each
            if turn > 0 and name == FROM_DATA:
                useful += tokens

    if dist.get_rank() == 0:
        whole = len(seconds[FROM_DATA]) * ours.experiment.model.seq_length
        show(seconds, 1 - useful / whole)
    batches.take(more=False)
    ours.trainer.release_graphs()
    dist.destroy_process_group()


def one_turn(ours: Ours, take: Callable[[], Any], iteration: int) -> tuple[list[float], int]:
    """Seconds of each of STEPS steps after `iteration`, and the tokens of all that are no padding."""
    marks = [Mark("cuda")]
    tokens = []
    for step in range(1, STEPS + 1):
        ready = take()
        tokens.append(ready[0].num_tokens)
        outcome = train_step(ours.trainer, iter(ready), iteration + step)
        marks.append(outcome.done)
        # As a run does: it reads the iteration before.
        marks[-2].wait()
    marks[-1].wait()
    seconds = [after.seconds_since(before) for before, after in pairwise(marks)]
    return seconds, sum(int(count) for count in tokens)


def show(seconds: dict[str, list[float]], padding: float) -> None:
    """Print a line for each source, and the ratio of their medians."""
    for name, each in seconds.items():
        median = 1e3 * statistics.median(each)
        mean = 1e3 * statistics.mean(each)
        p95 = 1e3 * sorted(each)[int(0.95 * len(each))]
        print(f"{name}: median {median:.1f} ms, mean {mean:.1f}, p95 {p95:.1f}")
    ratio = statistics.median(seconds[FROM_DATA]) / statistics.median(seconds[ON_GPU])
    print(f"ratio {ratio:.3f}; padding {padding:.1%}", flush=True)


if __name__ == "__main__":
    main()
