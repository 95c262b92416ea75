"""Core attention by itself: ours, beside `scaled_dot_product_attention` where all lengths are equal.

usage: python benchmarks/attention.py [HEAD_SIZE ...]

Ours is cuDNN through Transformer Engine, and FlashAttention 4 where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
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
MIXED = (4096, 2304, 256, 1024, 3025, 625, 1936, 1369, 484, 1265)
Lengths = list[tuple[int, int]]
"""(queries, keys) of each segment."""
CASES: dict[str, Lengths] = {
    "self, 8 x 1024": [(1024, 1024)] * 8,
    "self, 32 x 1024": [(1024, 1024)] * 32,
    "self, 1 x 8192": [(8192, 8192)],
    "cross, 8 x 1024 to 512": [(1024, 512)] * 8,
    "cross, 32 x 1024 to 512": [(1024, 512)] * 32,
    "cross, 1 x 8192 to 512": [(8192, 512)],
    "self, mixed 256 to 4096": [(length, length) for length in MIXED],
    "self, 1 x 8192 and padding": [(7000, 7000), (1192, 1192)],
}


def milliseconds(work: Callable[[], object]) -> float:
    """Median, as a CUDA graph: the kernels' time, not the host's."""
    return float(do_bench_cudagraph(work, rep=20, return_mode="median"))


def power_of_two(n: int) -> int:
    """The first power of two that is not below a number."""
    return 1 << (n - 1).bit_length()


# The ways, each on packed q, k, v of [T, H, C].


def ours(
    attend: Callable[..., tuple[Tensor, ...]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Lengths,
    equal: int,
    *options: bool,
) -> Tensor:
    """Attention of ours; `equal`: the number of segments where all are of one length, else 0."""
    by_side = list(zip(*lengths, strict=True))
    ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device="cuda") for each in by_side]
    bounds = [power_of_two(max(each)) for each in by_side]
    return attend(q, k, v, *ends, *bounds, equal, *options)[0]


def dense(q: Tensor, k: Tensor, v: Tensor, count: int, backend: SDPBackend) -> Tensor:
    """PyTorch's, on `count` segments of one length."""
    batched = [t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)]
    with sdpa_kernel(backend):
        x = F.scaled_dot_product_attention(*batched)
    return x.transpose(1, 2).reshape(q.shape)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """In fp32, segment by segment."""
    queries = [each[0] for each in lengths]
    keys = [each[1] for each in lengths]
    segments = zip(q.float().split(queries), k.float().split(keys), v.float().split(keys), strict=True)
    outputs = []
    for segment in segments:
        heads_first = [x.transpose(0, 1)[None] for x in segment]
        out = F.scaled_dot_product_attention(*heads_first)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def ways(inputs: Sequence[Tensor], lengths: Lengths) -> dict[str, Callable[[], Tensor]]:
    """Every way that takes the lengths, by name."""
    found: dict[str, Callable[[], Tensor]] = {}
    count = len(lengths)
    are_equal = len(set(lengths)) == 1
    kinds = {"packed": 0}
    if are_equal:
        kinds["equal"] = count
    for kind, equal in kinds.items():
        found[f"cuDNN, {kind}"] = partial(ours, fused_attention, *inputs, lengths, equal)
        if flash_attention:
            found[f"flash 4, {kind}"] = partial(ours, flash_attention, *inputs, lengths, equal, False)
    if are_equal:
        found["SDPA, cuDNN"] = partial(dense, *inputs, count, SDPBackend.CUDNN_ATTENTION)
        found["SDPA, flash"] = partial(dense, *inputs, count, SDPBackend.FLASH_ATTENTION)
    return found


def measure(name: str, lengths: Lengths, head: int) -> None:
    """Print a line for each back end: times, rates, and the error of the output and of each gradient."""
    heads = WIDTH // head
    queries, keys = (sum(each) for each in zip(*lengths, strict=True))
    inputs = []
    for total in (queries, keys, keys):
        x = torch.randn(total, heads, head, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        inputs.append(x)
    grad = torch.randn_like(inputs[0])
    operations = 4 * WIDTH * sum(a * b for a, b in lengths)

    # For longer packs the reference is left out, and so are the errors.
    expected = []
    if max(queries, keys) <= 8192:
        out = reference(*inputs, lengths)
        expected = [out, *torch.autograd.grad(out, inputs, grad.float())]

    for way, work in ways(inputs, lengths).items():
        forward = milliseconds(work)
        both = milliseconds(lambda work=work: torch.autograd.grad(work(), inputs, grad))
        out = work()
        got = [out, *torch.autograd.grad(out, inputs, grad)]
        errors = [relative_error(a, b) for a, b in zip(got, expected, strict=False)]
        rate = operations / forward / 1e9
        rate_of_both = 3 * operations / both / 1e9
        shown = " ".join(f"{error:.1e}" for error in errors)
        print(
            f"d {head:3d}  {name:28s} {way:14s} forward {forward:7.3f} ms {rate:4.0f} TFLOP/s  "
            f"both {both:7.3f} ms {rate_of_both:4.0f} TFLOP/s  {shown}",
            flush=True,
        )


def relative_error(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp32."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def main() -> None:
    """Every case for each head size."""
    for head in [int(word) for word in sys.argv[1:]] or [72, 128]:
        for name, lengths in CASES.items():
            measure(name, lengths, head)


if __name__ == "__main__":
    main()
