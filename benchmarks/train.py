"""Training throughput on this machine's GPUs, beside a compiled plain PyTorch DiT of our shape, in one process.

usage: torchrun --nproc-per-node N benchmarks/train.py [W1 W2 W3 W4 L32 L128 ...] [key=value ...]
           [--profile DIR] [--json FILE]

Ours (benchmarks/ours.py) is the trainer's own `train_step`. The peer (benchmarks/peer.py) has bf16 weights and fused
AdamW. Steps alternate in blocks; each figure is the median over all timed steps, by CUDA events.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import benchmarks.peer
from benchmarks.ours import Ours
from benchmarks.peer import Peer
from benchmarks.timing import Runner, Step, forget, interleaved, matmul_rate, rank, timed
from benchmarks.workloads import (
    HEADS,
    PACK,
    PEAK,
    WORKLOADS,
    Shapes,
    flops,
    mixed,
    packs_of,
    padded_batches,
    tokens_of,
)

# The peers.

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_WEIGHTS = {
    "bf16": ("bf16",),
    "fp32": ("fp32",),
    "both": ("bf16", "fp32"),
    "none": (),
}
"""The weights of the peers, by --peers; fp32 under autocast."""


def peers(args: argparse.Namespace, workload: str) -> dict[str, Runner]:
    """The peers of a workload, by name."""
    found: dict[str, Runner] = {}
    for weights in _WEIGHTS[args.peers]:
        if workload == "W4":
            found |= _peers_on_mixed(args, weights)
        else:
            found |= _peers_on_equal(args, workload, weights)
    return found


def _peers_on_mixed(args: argparse.Namespace, weights: str) -> dict[str, Runner]:
    """W4: every picture padded to the longest, or to the bound of its bucket."""
    peer = Peer(args.heads, _DTYPES[weights])
    shapes = mixed(2000)
    bounds_of = {
        "padded": [4096],
        "bucketed": [side**2 for side in range(20, 65, 4)],
    }
    found = {}
    for name, bounds in bounds_of.items():
        made = padded_batches(shapes, bounds)
        # One batch on the GPU for each size.
        kinds = {(count, each): peer.batch(count, each) for count, each, _ in made}
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(len(made), generator=generator).tolist()
        shuffled = [made[i] for i in order]
        batches = [kinds[count, each] for count, each, _ in shuffled]
        tokens = [useful for _, _, useful in shuffled]
        found[f"{name} peer, {weights} weights"] = Runner(peer.step, batches, tokens)
    return found


def _peers_on_equal(args: argparse.Namespace, workload: str, weights: str) -> dict[str, Runner]:
    peer = Peer(args.heads, _DTYPES[weights])
    shapes = WORKLOADS[workload][0]
    count = len(shapes)
    tokens = tokens_of(shapes)
    batches = [peer.batch(count, tokens // count) for _ in range(3)]
    found = {f"peer, {weights} weights": Runner(peer.step, batches, [tokens] * 3)}
    if args.peer_graph:
        captured = Peer(args.heads, _DTYPES[weights])
        captured.capture(batches[0])
        found[f"peer, {weights} weights, graph"] = Runner(captured.step, batches, [tokens] * 3)
    return found


# Measuring.


def measure(args: argparse.Namespace, workload: str, overrides: list[str]) -> list[dict[str, Any]]:
    """The rows of one workload."""
    # The peers are built first, then ours.
    is_mixed = workload == "W4"
    packs = packs_of(mixed(400))[:24] if is_mixed else WORKLOADS[workload] * 3
    runners = peers(args, workload)
    ours = Ours(PACK if is_mixed else tokens_of(packs[0]), args.heads, overrides)
    runners["ours"] = Runner(
        step=ours.step,
        batches=[ours.batch(shapes) for shapes in packs],
        tokens=[tokens_of(shapes) for shapes in packs],
    )

    seconds = interleaved(runners, args.steps, args.rounds)
    # Raises where the loss is not finite.
    ours.outcome.values(0)

    # A row each.
    rows = []
    for name, each in seconds.items():
        row = {
            "workload": workload,
            "who": name,
            "heads": args.heads,
            "tokens_per_s": _rate(runners[name], each, is_mixed) * (ours.replicas if name == "ours" else 1),
            "ms": statistics.median(each) * 1e3,
            "p95_ms": sorted(each)[int(0.95 * len(each))] * 1e3,
            "overrides": overrides,
            "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        }
        if not is_mixed:
            row["mfu"] = flops(packs[0]) * ours.share / statistics.median(each) / PEAK
        elif name == "ours":
            row |= _use_of_packs(packs, each)
        rows.append(row)
    if rank() == 0:
        _show(workload, rows)
    if args.profile:
        profile(ours.step, cycle(runners["ours"].batches), args.profile / f"{workload}.txt")
    return rows


def _rate(runner: Runner, seconds: list[float], is_mixed: bool) -> float:
    """Useful tokens a second: over all steps where they differ in size, else from the median step."""
    if not is_mixed:
        return runner.tokens[0] / statistics.median(seconds)
    useful = [tokens for tokens, _ in zip(cycle(runner.tokens), seconds, strict=False)]
    return sum(useful) / sum(seconds)


def _use_of_packs(packs: list[Shapes], seconds: list[float]) -> dict[str, float]:
    useful = sum(tokens_of(shapes) for shapes in packs)
    operations = sum(flops(shapes) for shapes in packs)
    return {
        "padding": 1 - useful / len(packs) / PACK,
        "mfu": operations / len(packs) / statistics.mean(seconds) / PEAK,
    }


def _show(workload: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows, and our rate beside each peer's; ours is the last row."""
    for row in rows:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    ours = rows[-1]["tokens_per_s"]
    for row in rows[:-1]:
        ratio = ours / row["tokens_per_s"]
        print(f"{workload}: ours / {row['who']} = {ratio:.3f}", flush=True)


# Profiling.


def profile(step: Step, batches: Iterator[Any], out: Path) -> None:
    """Where three steps' time goes, kernel by kernel, and after which kernels the GPU waits."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        timed(step, batches, 3)
    if rank():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    trace = out.with_suffix(".json")
    found.export_chrome_trace(str(trace))
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    events = json.loads(trace.read_text())["traceEvents"]
    out.write_text(f"{waits(events)}\n{table}")
    trace.unlink()


def waits(events: list[dict[str, Any]]) -> str:
    """How long the GPU did nothing, and between which kernels most of it, from a Chrome trace."""
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work = sorted((event["ts"], event["ts"] + event["dur"], event["name"][:60]) for event in on_gpu)
    gaps = Counter[tuple[str, str]]()
    began, end, before = work[0]
    for start, stop, name in work[1:]:
        if start > end:
            gaps[before, name] += start - end
        # Kernels overlap: the one that ends last is what the next waits after.
        if stop > end:
            end = stop
            before = name
    lines = [f"of {(end - began) / 1e3:.1f} ms the GPU did nothing for {gaps.total() / 1e3:.1f}"]
    for (before, after), gap in gaps.most_common(12):
        lines.append(f"{gap / 1e3:8.2f} ms after {before} before {after}")
    return "\n".join(lines)


def main() -> None:
    """Measure the workloads that are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peers",
        choices=["bf16", "fp32", "both", "none"],
        default="bf16",
        help="the peer's weights; fp32 under autocast",
    )
    parser.add_argument(
        "--peer-graph",
        action="store_true",
        help="also the peer with forward and backward in a CUDA graph",
    )
    parser.add_argument(
        "--cudnn-peer",
        action="store_true",
        help="the peer's attention by cuDNN, not by torch's first choice",
    )
    args = parser.parse_intermixed_args()
    workloads = [word for word in args.words if "=" not in word]
    overrides = [word for word in args.words if "=" in word]

    # The device, and what it gives today.
    if args.cudnn_peer:
        benchmarks.peer.attention = benchmarks.peer.cudnn_attention
    torch._dynamo.config.recompile_limit = 64
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.cuda.get_device_name()
    rate = matmul_rate() / 1e12
    print(f"{device}, torch {torch.__version__}; 8192^3 bf16 product: {rate:.0f} TFLOP/s", flush=True)

    rows = []
    for workload in workloads:
        rows += measure(args, workload, overrides)
        forget()
    if args.json and rank() == 0:
        args.json.write_text(json.dumps(rows, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
