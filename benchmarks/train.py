"""Training throughput on this machine's GPUs, beside a compiled plain PyTorch DiT of the same shape, in the same process.

usage: torchrun --nproc-per-node N benchmarks/train.py [W1 W2 W3 W4 L32 L128 ...] [key=value ...] [--profile DIR] [--json FILE]

Ours is the trainer's own `train_step` (megatron-core's DDP and distributed optimizer, fp32 main weights, clipping, averaged
weights) on microbatches that lie on the GPU. The peer has bf16 weights and fused AdamW, and neither clipping nor an average.
Steps alternate in blocks; each figure is the median over all timed steps, by CUDA events.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

PEAK = 989e12
"""Dense bf16 of an H100 or H200, operations a second."""
LAYERS, WIDTH, HEADS, TEXT, TEXT_WIDTH, LORA, PATCH = 28, 1152, 16, 512, 1024, 256, 64

# The peer.


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, C]; by name, since the compiler does not choose it when all else is forbidden, but falls back to plain products."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]


attention: Callable[..., Tensor] = F.scaled_dot_product_attention
"""The peer's."""


class PlainBlock(nn.Module):
    """Self-attention, cross-attention, MLP, each with adaLN-LoRA; q/k norms; [B, T, D]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, head = heads, WIDTH // heads
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.q, self.cross_proj = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(TEXT_WIDTH, 2 * WIDTH, bias=False)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.down, self.up = nn.Linear(WIDTH, LORA, bias=False), nn.Linear(LORA, 9 * WIDTH, bias=False)
        self.norms = nn.ParameterList(nn.Parameter(torch.ones(head)) for _ in range(4))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        q, k = F.rms_norm(q, q.shape[-1:], q_norm, 1e-6), F.rms_norm(k, k.shape[-1:], k_norm, 1e-6)
        return attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, noise: Tensor, text: Tensor) -> Tensor:
        """[B, T, D], [B, D], [B, L, E] -> [B, T, D]"""
        split = (self.heads, WIDTH // self.heads)
        m = self.up(self.down(F.silu(noise))).unsqueeze(1).chunk(9, dim=-1)

        def modulated(x: Tensor, i: int) -> Tensor:
            return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + m[i + 1]) + m[i]

        q, k, v = self.qkv(modulated(x, 0)).unflatten(-1, (3, *split)).unbind(2)
        x = x + m[2] * self.proj(self._attend(q, k, v, self.norms[0], self.norms[1]))
        k, v = self.kv(text).unflatten(-1, (2, *split)).unbind(2)
        x = x + m[5] * self.cross_proj(self._attend(self.q(modulated(x, 3)).unflatten(-1, split), k, v, self.norms[2], self.norms[3]))
        return x + m[8] * self.fc2(F.gelu(self.fc1(modulated(x, 6)), approximate="tanh"))


class PlainDiT(nn.Module):
    """The same network as ours, without packing."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.embed, self.final = nn.Linear(PATCH, WIDTH), nn.Linear(WIDTH, PATCH)
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(PlainBlock(heads) for _ in range(LAYERS))

    def forward(self, patches: Tensor, positions: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """[B, T, P], [T, D], [B, D], [B, L, E] -> [B, T, P]"""
        x, noise = self.embed(patches) + positions, self.time(level)
        for block in self.blocks:
            x = _compiled(block, x, noise, text)
        return self.final(x)


_compiled = torch.compile(lambda block, *inputs: block(*inputs), dynamic=False, fullgraph=True)
"""Once for each shape; every block is of the same code."""


class Peer:
    """Training steps of the plain DiT on batches of given (images, tokens)."""

    def __init__(self, heads: int, weights: torch.dtype) -> None:
        torch.manual_seed(0)
        model = PlainDiT(heads).to("cuda", weights)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.model = model
        self._graph: Any = None
        self.autocast = weights == torch.float32

    def batch(self, images: int, tokens: int) -> tuple[Tensor, ...]:
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        return (
            torch.randn(images, tokens, PATCH, **kind), torch.randn(tokens, WIDTH, **kind), torch.randn(images, WIDTH, **kind),
            torch.randn(images, TEXT, TEXT_WIDTH, **kind), torch.randn(images, tokens, PATCH, **kind),
        )  # fmt: skip

    def step(self, batch: tuple[Tensor, ...]) -> None:
        if self._graph:
            graph, inputs = self._graph
            for mine, theirs in zip(inputs, batch, strict=True):
                mine.copy_(theirs)
            graph.replay()
        else:
            self._forward_backward(batch)
        self.optimizer.step()
        if not self._graph:
            self.optimizer.zero_grad(set_to_none=True)

    def capture(self, batch: tuple[Tensor, ...]) -> None:
        """From now on, forward and backward from a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._forward_backward(batch)
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph, inputs = torch.cuda.CUDAGraph(), tuple(x.clone() for x in batch)
        with torch.cuda.graph(graph, stream=stream):
            self._forward_backward(inputs)
        self._graph = (graph, inputs)

    def _forward_backward(self, batch: tuple[Tensor, ...]) -> None:
        *inputs, target = batch
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            output = self.model(*inputs)
        loss = (output.float() - target.float()).square().mean()
        loss.backward()


# Ours.


def experiment(length: int, heads: int, overrides: list[str]) -> Any:
    """A complete configuration, through the same stages as a run."""
    from dfmspec.check.rules import check_spec
    from dfmspec.read.load import load_spec
    from dfmspec.read.resolve import resolve_spec
    from dfmspec.spec.experiment import Experiment
    from dfmspec.targets import target_module

    world = int(os.environ.get("WORLD_SIZE", "1"))
    words = [
        "recipe=dit_xl", "data.source=mock", f"dataset.task_encoder_seq_length={length}", f"model.num_attention_heads={heads}",
        f"cluster.nproc_per_node={world}", "model.max_img_h=160", "model.max_img_w=160", f"train.global_batch_size={world}", "train.train_iters=1000",
        "data.resolution=512", *overrides,
    ]  # fmt: skip
    spec = load_spec(None, words)
    resolved = resolve_spec(spec)
    problems = [finding for finding in check_spec(resolved) if finding.severity.name == "ERROR"]
    if problems:
        raise SystemExit("\n".join(str(problem) for problem in problems))
    return Experiment.model_validate(target_module("megatron_core").config(resolved.values))


class Ours:
    """Training steps of our trainer on packs of samples of given latent shapes."""

    def __init__(self, length: int, heads: int, overrides: list[str]) -> None:
        from megatron.core import parallel_state

        from dfmspec.trainer import setup, step

        self.experiment = experiment(length, heads, overrides)
        if not parallel_state.model_parallel_is_initialized():
            setup.initialize_distributed(self.experiment)
        self.trainer = setup.build_trainer(self.experiment)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # every weight awake: a network of zeros computes on zeros
            for chunk in self.trainer.chunks:
                for weight in chunk.parameters():
                    if not weight.any():
                        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        self.trainer.optimizer.reload_model_params()
        self.trainer.graphs = step.graphed(self.trainer)
        self._iteration, self._ordinal = 0, 0
        self.replicas = parallel_state.get_data_parallel_world_size()
        self.share = self.replicas / torch.distributed.get_world_size()
        """Of a replica's work that a GPU does."""
        torch.manual_seed(parallel_state.get_data_parallel_rank())

    def batch(self, shapes: list[tuple[int, int, int]]) -> Any:
        """One pack: a latent of `frames x 2 height x 2 width` for each (frames, height, width) in patches."""
        from dfmspec.trainer.data.microbatch import DrawnSample, microbatches
        from dfmspec.trainer.noise import draw

        samples = []
        for frames, height, width in shapes:
            shape = (16, frames, 2 * height, 2 * width)
            drawn = draw(shape, seed=1, split="train", stream=0, ordinal=self._ordinal, p_mean=0.0, p_std=1.0, dropout=0.2)
            samples.append(DrawnSample(str(self._ordinal), torch.randn(shape), torch.randn(TEXT, TEXT_WIDTH), drawn))
            self._ordinal += 1
        return next(microbatches(self.experiment, iter([tuple(samples)])))

    def step(self, batch: Any) -> None:
        from dfmspec.trainer.step import train_step

        self._iteration += 1
        self.outcome = train_step(self.trainer, iter([batch]), self._iteration)


# Measuring.

Shapes = list[tuple[int, int, int]]


def timed(step: Callable[[Any], None], batches: Iterator[Any], count: int) -> list[float]:
    """Seconds of each of `count` steps."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step(next(batches))
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def interleaved(runners: dict[str, tuple[Callable[[Any], None], list[Any]]], count: int, rounds: int) -> dict[str, list[float]]:
    """Steps of each runner, taken in turns, after each of its batches was met twice, and eight steps at least."""
    for step, batches in runners.values():
        warm = list({id(batch): batch for batch in batches}.values()) * 2
        timed(step, cycle(warm), max(8, len(warm)))
    gc.collect()
    gc.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    streams = {name: cycle(batches) for name, (_, batches) in runners.items()}
    for _ in range(rounds):
        for name, (step, _) in runners.items():
            seconds[name] += timed(step, streams[name], count)
    return seconds


def matmul_rate() -> float:
    """Operations a second of a large bf16 product on random data: what this card gives today."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    return 2 * 8192**3 / statistics.median(timed(lambda _: a @ b, cycle([None]), 30))


def flops(shapes: Shapes) -> float:
    """Model operations of one training step on useful tokens alone (forward x 3); trainer.md 1.5's formula."""
    s = [f * h * w for f, h, w in shapes]
    tokens, text, n = sum(s), TEXT * len(s), len(s)
    layer = 24 * tokens * WIDTH**2 + 4 * WIDTH * sum(x * x for x in s) + 4 * tokens * WIDTH**2 + 4 * text * TEXT_WIDTH * WIDTH
    layer += 4 * WIDTH * sum(x * TEXT for x in s) + 2 * n * WIDTH * LORA + 2 * n * LORA * 9 * WIDTH
    return 3 * (LAYERS * layer + 4 * tokens * WIDTH * PATCH + 4 * n * WIDTH**2)


WORKLOADS: dict[str, list[Shapes]] = {
    "W1": [[(1, 32, 32)] * 8], "W2": [[(1, 32, 32)] * 32], "W3": [[(8, 32, 32)]], "L32": [[(8, 64, 64)]], "L128": [[(32, 64, 64)]],
}  # fmt: skip
"""The samples of each pack, (frames, height, width) in patches."""
PACK = 16384
"""Tokens of a pack of W4."""


def mixed(count: int) -> Shapes:
    """`count` square pictures of 16 to 64 patches a side, 256 to 4,096 tokens, each side as likely."""
    sides = torch.randint(16, 65, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [(1, side, side) for side in sides]


def packs_of(shapes: Shapes) -> list[Shapes]:
    """Our packs: each sample into the first of 16 open ones that holds it, as the task encoder's buffer does; whole ones only."""
    still_open: list[Shapes] = []
    for shape in shapes:
        fitting = next((pack for pack in still_open if tokens_of(pack) + tokens_of([shape]) <= PACK), None)
        if fitting is None:
            still_open.append(fitting := [])
        fitting.append(shape)
    return still_open[:-16]


def tokens_of(shapes: Shapes) -> int:
    return sum(f * h * w for f, h, w in shapes)


def padded_batches(shapes: Shapes, bounds: list[int]) -> list[tuple[int, int, int]]:
    """(pictures, tokens each, tokens that are no padding) of batches of about PACK tokens, each padded to the bound of its bucket."""
    batches = []
    for low, high in pairwise([0, *bounds]):
        inside = [shape for shape in shapes if low < tokens_of([shape]) <= high]
        size = max(1, PACK // high)
        batches += [(size, high, tokens_of(inside[i : i + size])) for i in range(0, len(inside) - size + 1, size)]
    return batches


def peers(args: argparse.Namespace, workload: str) -> dict[str, tuple[Callable[[Any], None], list[Any], list[int]]]:
    """Step, batches and their useful tokens of each peer: bf16 weights, or fp32 under autocast."""
    found: dict[str, Any] = {}
    for weights in {"both": ("bf16", "fp32"), "none": ()}.get(args.peers, (args.peers,)):
        peer = Peer(args.heads, torch.bfloat16 if weights == "bf16" else torch.float32)
        if workload == "W4":
            shapes = mixed(2000)
            for name, bounds in (("padded", [4096]), ("bucketed", [side**2 for side in range(20, 65, 4)])):
                made = padded_batches(shapes, bounds)
                kinds = {(count, each): peer.batch(count, each) for count, each, _ in made}
                order = torch.randperm(len(made), generator=torch.Generator().manual_seed(1)).tolist()
                found[f"{name} peer, {weights} weights"] = (peer.step, [kinds[made[i][:2]] for i in order], [made[i][2] for i in order])
            continue
        count, tokens = len(WORKLOADS[workload][0]), tokens_of(WORKLOADS[workload][0])
        batches = [peer.batch(count, tokens // count) for _ in range(3)]
        found[f"peer, {weights} weights"] = (peer.step, batches, [tokens] * 3)
        if args.peer_graph:
            peer = Peer(args.heads, torch.bfloat16 if weights == "bf16" else torch.float32)
            peer.capture(batches[0])
            found[f"peer, {weights} weights, graph"] = (peer.step, batches, [tokens] * 3)
    return found


def measure(args: argparse.Namespace, workload: str, overrides: list[str]) -> list[dict[str, Any]]:
    """The rows of one workload."""
    packs = packs_of(mixed(400))[:24] if workload == "W4" else WORKLOADS[workload] * 3
    runners = peers(args, workload)
    ours = Ours(PACK if workload == "W4" else tokens_of(packs[0]), args.heads, overrides)
    runners["ours"] = (ours.step, [ours.batch(shapes) for shapes in packs], [tokens_of(shapes) for shapes in packs])
    seconds = interleaved({name: (step, batches) for name, (step, batches, _) in runners.items()}, args.steps, args.rounds)
    ours.outcome.values(0)  # finite
    rows = []
    for name, each in seconds.items():
        useful = [tokens for _, tokens in zip(each, cycle(runners[name][2]), strict=False)]
        # where steps differ in size, their sum; else the median of all
        rate = (ours.replicas if name == "ours" else 1) * (sum(useful) / sum(each) if workload == "W4" else useful[0] / statistics.median(each))
        row = {
            "workload": workload, "who": name, "heads": args.heads, "tokens_per_s": rate, "ms": statistics.median(each) * 1e3,
            "p95_ms": sorted(each)[int(0.95 * len(each))] * 1e3, "overrides": overrides, "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
        }  # fmt: skip
        if workload != "W4":
            row["mfu"] = flops(packs[0]) * ours.share / statistics.median(each) / PEAK
        elif name == "ours":
            row |= {"padding": 1 - sum(map(tokens_of, packs)) / len(packs) / PACK, "mfu": sum(map(flops, packs)) / len(packs) / statistics.mean(each) / PEAK}
        rows.append(row)
        if rank() == 0:
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    for row in rows[:-1] if rank() == 0 else ():
        print(f"{workload}: ours / {row['who']} = {rows[-1]['tokens_per_s'] / row['tokens_per_s']:.3f}", flush=True)
    if args.profile:
        profile(ours.step, cycle(runners["ours"][1]), args.profile / f"{workload}.txt")
    return rows


def forget() -> None:
    """Between two workloads: what was compiled, the memory, its peak."""
    gc.unfreeze()
    gc.collect()
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def main() -> None:
    """Measure the workloads that are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", choices=["bf16", "fp32", "both", "none"], default="bf16", help="the peer's weights; fp32 under autocast")
    parser.add_argument("--peer-graph", action="store_true", help="also the peer with forward and backward in a CUDA graph")
    parser.add_argument("--cudnn-peer", action="store_true", help="the peer's attention by cuDNN, not by torch's first choice")
    args = parser.parse_intermixed_args()
    if args.cudnn_peer:
        global attention  # noqa: PLW0603
        attention = cudnn_attention
    torch._dynamo.config.recompile_limit = 64
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; 8192^3 bf16 product: {matmul_rate() / 1e12:.0f} TFLOP/s", flush=True)
    rows = []
    for workload in [word for word in args.words if "=" not in word]:
        rows += measure(args, workload, [word for word in args.words if "=" in word])
        forget()
    if args.json and rank() == 0:
        args.json.write_text(json.dumps(rows, indent=1))
    torch.distributed.destroy_process_group()


def profile(step: Callable[[Any], None], batches: Iterator[Any], out: Path) -> None:
    """Where three steps' time goes, kernel by kernel, and after which kernels the GPU waits."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as found:
        timed(step, batches, 3)
    if rank():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    trace = out.with_suffix(".json")
    found.export_chrome_trace(str(trace))
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    out.write_text(f"{waits(json.loads(trace.read_text())['traceEvents'])}\n{table}")
    trace.unlink()


def waits(events: list[dict[str, Any]]) -> str:
    """How long the GPU did nothing, and between which kernels most of it, from a Chrome trace."""
    work = sorted((e["ts"], e["ts"] + e["dur"], e["name"][:60]) for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    (began, end, before), gaps = work[0], Counter[tuple[str, str]]()
    for start, stop, name in work[1:]:
        if start > end:
            gaps[before, name] += start - end
        if stop > end:
            end, before = stop, name
    lines = [f"of {(end - began) / 1e3:.1f} ms the GPU did nothing for {gaps.total() / 1e3:.1f}"]
    return "\n".join(lines + [f"{gap / 1e3:8.2f} ms after {pair[0]} before {pair[1]}" for pair, gap in gaps.most_common(12)])


if __name__ == "__main__":
    main()
