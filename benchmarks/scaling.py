"""How DiT-XL scales over the GPUs of this machine: replicas on W2, tensor and context parallelism on one sample; memory.

usage: torchrun --nproc-per-node N benchmarks/scaling.py [WORD ...] [key=value ...]    the layouts of N GPUs, or those whose name has a WORD
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
from benchmarks.train import HEADS, PEAK, WORKLOADS, Ours, flops, forget, rank, timed, tokens_of

RECOMPUTE = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"]
STEPS = {"W2": (8, 12), "W3": (8, 20), "L32": (5, 8), "L128": (2, 3)}
"""Steps before the timed ones, and the timed."""


def layouts(gpus: int) -> dict[str, list[str]]:
    """Overrides by the name of a workload and a layout."""
    found = {f"W2 DP{gpus}": []}
    for workload, memory in (("W3", []), ("L32", []), ("L128", RECOMPUTE)):
        shared = ["train.global_batch_size=1", *memory]
        if gpus == 1:
            found[f"{workload} one GPU"] = shared
        else:
            found[f"{workload} TP{gpus} SP"] = [*shared, f"model.tensor_model_parallel_size={gpus}", "model.sequence_parallel=true"]
            found[f"{workload} CP{gpus}"] = [*shared, f"model.context_parallel_size={gpus}"]
    return found


def main() -> None:
    """Rows of a Markdown table."""
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch._dynamo.config.recompile_limit = 64
    if rank() == 0:
        print("| workload and layout | tokens/s | ms | MFU | GiB of GPU 0 |\n|---|---|---|---|---|", flush=True)
    words, given = [word for word in sys.argv[1:] if "=" not in word], [word for word in sys.argv[1:] if "=" in word]
    chosen = {name: [*overrides, *given] for name, overrides in layouts(gpus).items() if not words or any(word in name for word in words)}
    for name, overrides in chosen.items():
        workload = name.split()[0]
        shapes, (before, count) = WORKLOADS[workload][0], STEPS[workload]
        ours = Ours(tokens_of(shapes), HEADS, overrides)
        batches = cycle([ours.batch(shapes) for _ in range(2)])
        timed(ours.step, batches, before)
        seconds = statistics.median(timed(ours.step, batches, count))
        ours.outcome.values(0)  # finite
        rate, mfu = ours.replicas * tokens_of(shapes) / seconds, flops(shapes) * ours.share / seconds / PEAK
        if rank() == 0:
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"| {name} | {rate / 1e3:.1f} k | {seconds * 1e3:.1f} | {mfu:.3f} | {peak:.1f} |", flush=True)
        ours.trainer.release_graphs()
        del ours, batches
        parallel_state.destroy_model_parallel()
        forget()
    if chosen:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
