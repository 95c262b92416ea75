"""Seconds of training steps by CUDA events, and what the benchmarks of several processes share."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import torch

Step = Callable[[Any], None]


class Runner(NamedTuple):
    """Something that trains, and on what."""

    step: Step
    batches: Sequence[Any]
    tokens: Sequence[int]
    """Of each batch, those that are no padding."""


def rank() -> int:
    """The rank of this process under torchrun; 0 without."""
    return int(os.environ.get("RANK", "0"))


def timed(step: Step, batches: Iterator[Any], count: int) -> list[float]:
    """Seconds of each of `count` steps."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step(next(batches))
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def interleaved(runners: dict[str, Runner], count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each runner's steps, `count` of each in turns, after each of its batches was met twice."""
    # Every batch twice, and eight steps at least.
    for runner in runners.values():
        distinct = list({id(batch): batch for batch in runner.batches}.values())
        warm = distinct * 2
        timed(runner.step, cycle(warm), max(8, len(warm)))
    # As a run does: no collection while steps are timed.
    gc.collect()
    gc.freeze()

    seconds: dict[str, list[float]] = {name: [] for name in runners}
    streams = {name: cycle(runner.batches) for name, runner in runners.items()}
    for _ in range(rounds):
        for name, runner in runners.items():
            seconds[name] += timed(runner.step, streams[name], count)
    return seconds


def matmul_rate() -> float:
    """Operations a second of a large bf16 product on random data: what this card gives today."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(5):
        a @ b
    seconds = timed(lambda _: a @ b, cycle([None]), 30)
    return 2 * 8192**3 / statistics.median(seconds)


def forget() -> None:
    """Between two workloads: forget what was compiled, the memory, its peak."""
    gc.unfreeze()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
