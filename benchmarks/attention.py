"""Core attention by itself: cuDNN through Transformer Engine and FlashAttention 4 (ours), beside `scaled_dot_product_attention` on equal lengths.

usage: python benchmarks/attention.py [HEAD_SIZE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).parents[1]))
from dfmspec.trainer.ops.cudnn_attention import fused_attention

try:
    from dfmspec.trainer.ops.flash_attention import flash_attention
except ImportError:
    flash_attention = None

WIDTH = 1152
CASES = {
    "self, 8 x 1024": [(1024, 1024)] * 8, "self, 32 x 1024": [(1024, 1024)] * 32, "self, 1 x 8192": [(8192, 8192)],
    "cross, 8 x 1024 to 512": [(1024, 512)] * 8, "cross, 32 x 1024 to 512": [(1024, 512)] * 32, "cross, 1 x 8192 to 512": [(8192, 512)],
    "self, mixed 256 to 4096": [(n, n) for n in (4096, 2304, 256, 1024, 3025, 625, 1936, 1369, 484, 1265)],
    "self, 1 x 8192 and padding": [(7000, 7000), (1192, 1192)],
}  # fmt: skip


def milliseconds(work: Callable[[], object]) -> float:
    """Median, as a CUDA graph: the kernels' time, not the host's."""
    return float(do_bench_cudagraph(work, rep=20, return_mode="median"))


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ours(attend: Callable[..., tuple[Tensor, ...]], q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]], equal: int, *options: bool) -> Tensor:
    cu = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device="cuda") for each in zip(*lengths, strict=True)]
    bounds = [power_of_two(max(each)) for each in zip(*lengths, strict=True)]
    return attend(q, k, v, *cu, *bounds, equal, *options)[0]


def dense(q: Tensor, k: Tensor, v: Tensor, count: int, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        x = F.scaled_dot_product_attention(*(t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)))
    return x.transpose(1, 2).reshape(q.shape)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[tuple[int, int]]) -> Tensor:
    """In fp32, segment by segment."""
    queries, keys = ([each[i] for each in lengths] for i in (0, 1))
    pieces = zip(q.float().split(queries), k.float().split(keys), v.float().split(keys), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in piece))[0].transpose(0, 1) for piece in pieces])


def measure(name: str, lengths: list[tuple[int, int]], head: int) -> None:
    """Print a line for each back end."""
    heads, totals = WIDTH // head, [sum(each) for each in zip(*lengths, strict=True)]
    inputs = [torch.randn(total, heads, head, device="cuda", dtype=torch.bfloat16, requires_grad=True) for total in (totals[0], totals[1], totals[1])]
    grad = torch.randn_like(inputs[0])
    operations = 4 * WIDTH * sum(a * b for a, b in lengths)
    same = len(lengths) if len(set(lengths)) == 1 else 0
    ways: dict[str, Callable[[], Tensor]] = {}
    for equal in dict.fromkeys((0, same)):
        ways[f"cuDNN, {'equal' if equal else 'packed'}"] = partial(ours, fused_attention, *inputs, lengths, equal)
        if flash_attention:
            ways[f"flash 4, {'equal' if equal else 'packed'}"] = partial(ours, flash_attention, *inputs, lengths, equal, False)
    if same:
        for way, backend in (("SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION), ("SDPA, flash", SDPBackend.FLASH_ATTENTION)):
            ways[way] = partial(dense, *inputs, len(lengths), backend)
    expected = []
    if max(totals) <= 8192:
        out = reference(*inputs, lengths)
        expected = [out, *torch.autograd.grad(out, inputs, grad.float())]
    for way, work in ways.items():
        forward = milliseconds(work)
        both = milliseconds(lambda work=work: torch.autograd.grad(work(), inputs, grad))
        out = work()
        got = [out, *torch.autograd.grad(out, inputs, grad)]
        errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, expected, strict=False)]
        print(
            f"d {head:3d}  {name:28s} {way:14s} forward {forward:7.3f} ms {operations / forward / 1e9:4.0f} TFLOP/s  "
            f"both {both:7.3f} ms {3 * operations / both / 1e9:4.0f} TFLOP/s  {' '.join(f'{error:.1e}' for error in errors)}",
            flush=True,
        )


def main() -> None:
    """Every case for each head size."""
    for head in [int(word) for word in sys.argv[1:]] or [72, 128]:
        for name, lengths in CASES.items():
            measure(name, lengths, head)


if __name__ == "__main__":
    main()
