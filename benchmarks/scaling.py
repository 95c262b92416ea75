"""How DiT-XL scales over the GPUs of this machine: replicas on W2, tensor and context parallelism on one sample.

usage: torchrun --nproc-per-node N benchmarks/scaling.py [WORD ...] [key=value ...]

The layouts of N GPUs, or those whose name has a WORD; their throughput and their memory.
"""

from __future__ import annotations

import os
import statistics
import sys
from itertools import cycle
from pathlib import Path

import torch
from megatron.core import parallel_state

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.ours import Ours
from benchmarks.timing import forget, rank, timed
from benchmarks.workloads import HEADS, PEAK, WORKLOADS, flops, tokens_of

RECOMPUTE = [
    "model.recompute_granularity=full",
    "model.recompute_method=uniform",
    "model.recompute_num_layers=1",
]
STEPS = {
    "W2": (8, 12),
    "W3": (8, 20),
    "L32": (5, 8),
    "L128": (2, 3),
}
"""Steps before the timed ones, and the timed."""


def layouts(gpus: int) -> dict[str, list[str]]:
    """Overrides by the name of a workload and a layout."""
    found: dict[str, list[str]] = {f"W2 DP{gpus}": []}
    memory = {"W3": [], "L32": [], "L128": RECOMPUTE}
    for workload, words in memory.items():
        shared = ["train.global_batch_size=1", *words]
        if gpus == 1:
            found[f"{workload} one GPU"] = shared
            continue
        found[f"{workload} TP{gpus} SP"] = [
            *shared,
            f"model.tensor_model_parallel_size={gpus}",
            "model.sequence_parallel=true",
        ]
        found[f"{workload} CP{gpus}"] = [*shared, f"model.context_parallel_size={gpus}"]
    return found


def asked_for(gpus: int, words: list[str]) -> dict[str, list[str]]:
    """The layouts that the command line names, or all, with its overrides."""
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    chosen = {}
    for layout, own in layouts(gpus).items():
        is_named = any(name in layout for name in names)
        if is_named or not names:
            chosen[layout] = [*own, *overrides]
    return chosen


def measure(name: str, overrides: list[str]) -> None:
    """Print the row of one layout, and take it down again."""
    workload = name.split(maxsplit=1)[0]
    shapes = WORKLOADS[workload][0]
    before, count = STEPS[workload]

    # Train.
    ours = Ours(tokens_of(shapes), HEADS, overrides)
    batches = cycle([ours.batch(shapes) for _ in range(2)])
    timed(ours.step, batches, before)
    seconds = statistics.median(timed(ours.step, batches, count))
    # Raises where the loss is not finite.
    ours.outcome.values(0)

    # Say.
    rate = ours.replicas * tokens_of(shapes) / seconds
    mfu = flops(shapes) * ours.share / seconds / PEAK
    if rank() == 0:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"| {name} | {rate / 1e3:.1f} k | {seconds * 1e3:.1f} | {mfu:.3f} | {peak:.1f} |", flush=True)

    # Forget; the graphs and the batches hold memory.
    ours.trainer.release_graphs()
    del ours, batches
    parallel_state.destroy_model_parallel()
    forget()


def main() -> None:
    """Rows of a Markdown table."""
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch._dynamo.config.recompile_limit = 64
    if rank() == 0:
        print("| workload and layout | tokens/s | ms | MFU | GiB of GPU 0 |\n|---|---|---|---|---|", flush=True)
    chosen = asked_for(gpus, sys.argv[1:])
    for name, overrides in chosen.items():
        measure(name, overrides)
    if chosen:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
