"""Our kernels by themselves at DiT-XL's shapes, by their settings: warps, rows, loads ahead.

usage: python benchmarks/kernels.py [adaln] [heads] [accumulate] [update] [fp8]

Each is timed as a CUDA graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).parents[1]))
from dfmspec.trainer.data.segments import rows_of
from dfmspec.trainer.ops.kernels import adaln, fp8, heads, optimizer

WIDTH = 1152
HEADS = 16
HEAD = WIDTH // HEADS
SEGMENT = 1024
"""Tokens of a sample."""
TOKENS = (32768, 8192)
"""Tokens of the packs on which a kernel is timed."""
EPS = 1e-6


def random(*shape: int) -> Tensor:
    """Normal numbers in bf16 on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def settings(module: ModuleType, **values: tuple[Any, ...]) -> Iterator[str]:
    """Set the module's constants to each combination, in turns; what is set now comes first, and again at the end."""
    names = list(values)
    before = tuple(getattr(module, name) for name in names)
    others = [each for each in product(*values.values()) if each != before]
    for chosen in (before, *others):
        words = []
        for name, value in zip(names, chosen, strict=True):
            setattr(module, name, value)
            word = name.strip("_").lower()
            words.append(f"{word} {value}")
        yield ", ".join(words)
    for name, value in zip(names, before, strict=True):
        setattr(module, name, value)


def show(what: str, setting: str, works: list[Callable[[], object]], moved: list[int]) -> None:
    """Print a line: microseconds and TB/s for each number of tokens; `moved`: the bytes that each moves."""
    # A setting may need more than a multiprocessor has.
    try:
        times = [do_bench_cudagraph(work, rep=15) for work in works]
    except Exception as error:
        reason = str(error).splitlines()[0][:60]
        print(f"{what:18s} {setting:44s} {reason}", flush=True)
        return
    cells = []
    for milliseconds, size in zip(times, moved, strict=True):
        rate = size / milliseconds / 1e9
        cells.append(f"{milliseconds * 1e3:7.1f} us {rate:4.2f} TB/s")
    line = "  ".join(cells)
    print(f"{what:18s} {setting:44s} {line}", flush=True)


def bytes_of(a_token: int) -> list[int]:
    """The bytes that a kernel moves, from those for a token, for each number of tokens."""
    return [a_token * tokens for tokens in TOKENS]


# adaLN.


class AdalnCase(NamedTuple):
    """Inputs of the fused adaLN on one pack."""

    x: Tensor
    y: Tensor
    gate: Tensor
    shift: Tensor
    scale: Tensor
    of_token: Tensor
    chunks: Tensor
    starts: Tensor
    dx: Tensor
    dz: Tensor


def adaln_case(tokens: int) -> AdalnCase:
    """A pack of samples of SEGMENT tokens."""
    samples = tokens // SEGMENT
    rows = rows_of(torch.arange(tokens) // SEGMENT, samples)
    # Columns of one matrix, as in the network.
    gate, shift, rest = random(samples, 9 * WIDTH).split([WIDTH, WIDTH, 7 * WIDTH], dim=1)
    return AdalnCase(
        x=random(tokens, WIDTH),
        y=random(tokens, WIDTH),
        gate=gate,
        shift=shift,
        scale=rest[:, :WIDTH],
        of_token=rows.of_token.cuda(),
        chunks=rows.chunks.cuda(),
        starts=rows.starts.cuda(),
        dx=random(tokens, WIDTH),
        dz=random(tokens, WIDTH),
    )


def adaln_forward(case: AdalnCase) -> tuple[Tensor, ...]:
    """The forward kernel, once."""
    return adaln.adaln(
        case.x,
        case.y,
        case.gate,
        case.shift,
        case.scale,
        case.of_token,
        case.chunks,
        case.starts,
        EPS,
        None,
        False,
    )


def adaln_backward(case: AdalnCase) -> Callable[[], object]:
    """The backward kernel, on what the forward one leaves to it."""
    x_out, _, mean, rstd, _ = adaln_forward(case)
    return lambda: adaln.adaln_backward(
        x_out,
        case.y,
        case.gate,
        case.scale,
        case.chunks,
        case.starts,
        mean,
        rstd,
        case.dx,
        case.dz,
        False,
    )


def measure_adaln() -> None:
    """Gate, norm, scale and shift in one."""
    cases = [adaln_case(tokens) for tokens in TOKENS]
    for setting in settings(adaln, _FORWARD_WARPS=(2, 4, 8)):
        works = [partial(adaln_forward, case) for case in cases]
        show("adaln", setting, works, bytes_of(8 * WIDTH))
    for setting in settings(adaln, _WARPS=(4, 8), _ROWS=(2, 4), _STAGES=(1, 3, 4, 5)):
        works = [adaln_backward(case) for case in cases]
        show("adaln, backward", setting, works, bytes_of(12 * WIDTH))


# Heads.


def measure_heads() -> None:
    """q, k and v out of their projection, q and k normed."""
    cases = []
    for tokens in TOKENS:
        weights = [random(HEAD) for _ in range(2)]
        x = random(tokens, 3 * WIDTH)
        gradients = [random(tokens, HEADS, HEAD) for _ in range(3)]
        cases.append((x, weights, gradients))

    for setting in settings(heads, _FORWARD_WARPS=(2, 4)):
        works = [partial(heads.heads, x, weights, 3, HEAD, EPS, None) for x, weights, _ in cases]
        show("heads", setting, works, bytes_of(12 * WIDTH))
    for setting in settings(heads, _TILE=(16, 32, 64), _WARPS=(4, 8), _PROGRAMS=(528, 1056), _STAGES=(1, 3, 4)):
        works = [partial(heads.heads_backward, *case, EPS, False) for case in cases]
        show("heads, backward", setting, works, bytes_of(16 * WIDTH))


# The optimizer.


def measure_accumulate() -> None:
    """Gradients of three weights into fp32."""
    shapes = ((WIDTH, WIDTH), (3 * WIDTH, WIDTH), (4 * WIDTH, WIDTH))
    cases = [(torch.empty(shape, device="cuda"), random(*shape)) for shape in shapes]
    moved = [6 * total.numel() for total, _ in cases]
    for setting in settings(optimizer, _BLOCK=(1024, 2048, 4096), _WARPS=(4, 8)):
        works = [partial(optimizer.accumulate, *case, replace=True) for case in cases]
        show("accumulate", setting, works, moved)


def measure_update() -> None:
    """Adam on a tenth and on a hundredth of DiT-XL's weights."""
    sizes = (67_000_000, 6_700_000)
    cases = [update_case(size) for size in sizes]
    for setting in settings(optimizer, UPDATE_BLOCK=(1024, 2048, 4096), _UPDATE_WARPS=(4, 8)):
        works = [update(case) for case in cases]
        show("update", setting, works, [30 * size for size in sizes])


def update_case(size: int) -> list[Tensor]:
    """Weight, gradient and both moments in fp32, the second of them not negative; and the weight in bf16."""
    values = [torch.randn(size, device="cuda") for _ in range(4)]
    values[3].abs_()
    return [*values, random(size)]


def update(values: list[Tensor]) -> Callable[[], object]:
    """The update kernel, on a table of blocks of the size that is set now."""
    size = len(values[0])
    rows = []
    for start in range(0, size, optimizer.UPDATE_BLOCK):
        addresses = [x.data_ptr() + x.element_size() * start for x in values]
        count = min(optimizer.UPDATE_BLOCK, size - start)
        rows.append([*addresses, count])
    return partial(
        optimizer.update,
        torch.tensor(rows, device="cuda"),
        torch.ones((), device="cuda"),
        clip=1.0,
        lr=1e-4,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        step=10,
        write=True,
    )


# FP8.


def measure_fp8() -> None:
    """Into FP8 and transposed, with the largest value before."""
    show_fp8("cast", fp8.PLAIN, WIDTH, 2)
    show_fp8("cast of GELU", fp8.GELU, 4 * WIDTH, 2)
    show_fp8("cast through GELU", fp8.GELU_BACKWARD, 4 * WIDTH, 4)


def show_fp8(what: str, how: int, width: int, bytes_read: int) -> None:
    """Time a cast of `width` values a token; `bytes_read`: of each value, once for the largest and once to cast."""
    works = []
    for tokens in TOKENS:
        x = random(tokens, width)
        # Through GELU's derivative, the cast reads GELU's input, too.
        h = random(tokens, width) if how == fp8.GELU_BACKWARD else None
        works.append(partial(fp8.quantize, x, h, None, how, False))
    show(what, "", works, bytes_of((2 * bytes_read + 2) * width))


MEASURES = {
    "adaln": measure_adaln,
    "heads": measure_heads,
    "accumulate": measure_accumulate,
    "update": measure_update,
    "fp8": measure_fp8,
}


def main() -> None:
    """Time the kernels that are named, or all."""
    device = torch.cuda.get_device_name()
    tokens = " and ".join(f"{tokens:,}" for tokens in TOKENS)
    print(f"{device}; {tokens} tokens", flush=True)
    for name, measure in MEASURES.items():
        if name in sys.argv[1:] or len(sys.argv) == 1:
            measure()


if __name__ == "__main__":
    main()
