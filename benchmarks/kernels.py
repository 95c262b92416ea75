"""Our kernels by themselves at DiT-XL's shapes, by their settings: warps, rows, loads ahead; each timed as a CUDA graph.

usage: python benchmarks/kernels.py [adaln] [heads] [accumulate] [update] [fp8]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

sys.path.insert(0, str(Path(__file__).parents[1]))
from dfmspec.trainer.data.segments import rows_of
from dfmspec.trainer.ops.kernels import adaln, fp8, heads, optimizer

WIDTH, HEADS, SEGMENT = 1152, 16, 1024
TOKENS = (32768, 8192)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def settings(module: ModuleType, **values: tuple[Any, ...]) -> Iterator[str]:
    """Set the module's constants to each combination, in turns; what is set now comes first, and again at the end."""
    names = list(values)
    before = tuple(getattr(module, name) for name in names)
    for chosen in (before, *(each for each in product(*values.values()) if each != before)):
        for name, value in zip(names, chosen, strict=True):
            setattr(module, name, value)
        yield ", ".join(f"{name.strip('_').lower()} {value}" for name, value in zip(names, chosen, strict=True))
    for name, value in zip(names, before, strict=True):
        setattr(module, name, value)


def show(what: str, setting: str, works: list[Callable[[], object]], moved: list[int]) -> None:
    """A line: microseconds and TB/s for each number of tokens."""
    try:
        times = [do_bench_cudagraph(work, rep=15) for work in works]
    except Exception as error:  # a setting may need more than a multiprocessor has
        print(f"{what:18s} {setting:44s} {str(error).splitlines()[0][:60]}", flush=True)
        return
    cells = (f"{time * 1e3:7.1f} us {size / time / 1e9:4.2f} TB/s" for time, size in zip(times, moved, strict=True))
    print(f"{what:18s} {setting:44s} {'  '.join(cells)}", flush=True)


def measure_adaln() -> None:
    """Gate, norm, scale and shift in one."""
    cases = []
    for tokens in TOKENS:
        n = tokens // SEGMENT
        rows = rows_of(torch.arange(tokens) // SEGMENT, n)
        where = rows.of_token.cuda(), rows.chunks.cuda(), rows.starts.cuda()
        gate, shift, scale = random(n, 9 * WIDTH).split([WIDTH, WIDTH, 7 * WIDTH], dim=1)
        cases.append((random(tokens, WIDTH), random(tokens, WIDTH), gate, shift, scale[:, :WIDTH], where, random(tokens, WIDTH), random(tokens, WIDTH)))

    def forward(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, where: tuple[Tensor, ...], *_: Tensor) -> tuple[Tensor, ...]:
        return adaln.adaln(x, y, gate, shift, scale, *where, 1e-6, None, False)

    def backward(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, where: tuple[Tensor, ...], dx: Tensor, dz: Tensor) -> Callable[[], object]:
        x_out, _, mean, rstd, _ = adaln.adaln(x, y, gate, shift, scale, *where, 1e-6, None, False)
        return lambda: adaln.adaln_backward(x_out, y, gate, scale, *where[1:], mean, rstd, dx, dz, False)

    for setting in settings(adaln, _FORWARD_WARPS=(2, 4, 8)):
        show("adaln", setting, [lambda case=case: forward(*case) for case in cases], [8 * WIDTH * tokens for tokens in TOKENS])
    for setting in settings(adaln, _WARPS=(4, 8), _ROWS=(2, 4), _STAGES=(1, 3, 4, 5)):
        show("adaln, backward", setting, [backward(*case) for case in cases], [12 * WIDTH * tokens for tokens in TOKENS])


def measure_heads() -> None:
    """q, k and v out of their projection, q and k normed."""
    cases = []
    for tokens in TOKENS:
        weights = [random(WIDTH // HEADS) for _ in range(2)]
        cases.append((random(tokens, 3 * WIDTH), weights, [random(tokens, HEADS, WIDTH // HEADS) for _ in range(3)]))
    for setting in settings(heads, _FORWARD_WARPS=(2, 4)):
        works = [lambda x=x, weights=weights: heads.heads(x, weights, 3, WIDTH // HEADS, 1e-6, None) for x, weights, _ in cases]
        show("heads", setting, works, [12 * WIDTH * tokens for tokens in TOKENS])
    for setting in settings(heads, _TILE=(16, 32, 64), _WARPS=(4, 8), _PROGRAMS=(528, 1056), _STAGES=(1, 3, 4)):
        works = [lambda case=case: heads.heads_backward(*case, 1e-6, False) for case in cases]
        show("heads, backward", setting, works, [16 * WIDTH * tokens for tokens in TOKENS])


def measure_accumulate() -> None:
    """Gradients of three weights into fp32."""
    shapes = ((WIDTH, WIDTH), (3 * WIDTH, WIDTH), (4 * WIDTH, WIDTH))
    cases = [(torch.empty(shape, device="cuda"), random(*shape)) for shape in shapes]
    for setting in settings(optimizer, _BLOCK=(1024, 2048, 4096), _WARPS=(4, 8)):
        show("accumulate", setting, [lambda case=case: optimizer.accumulate(*case, replace=True) for case in cases], [6 * case[0].numel() for case in cases])


def measure_update() -> None:
    """Adam on a tenth and on a hundredth of DiT-XL's weights."""
    cases = []
    for size in (67_000_000, 6_700_000):
        values = [torch.randn(size, device="cuda") for _ in range(4)]
        values[3].abs_()
        cases.append((size, [*values, random(size)]))
    for setting in settings(optimizer, UPDATE_BLOCK=(1024, 2048, 4096), _UPDATE_WARPS=(4, 8)):
        works = []
        for size, values in cases:
            starts = range(0, size, optimizer.UPDATE_BLOCK)
            rows = [[x.data_ptr() + x.element_size() * start for x in values] + [min(optimizer.UPDATE_BLOCK, size - start)] for start in starts]
            blocks, norm = torch.tensor(rows, device="cuda"), torch.ones((), device="cuda")
            how = {"clip": 1.0, "lr": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "step": 10, "write": True}
            works.append(lambda blocks=blocks, norm=norm, how=how: optimizer.update(blocks, norm, **how))
        show("update", setting, works, [30 * size for size, _ in cases])


def measure_fp8() -> None:
    """Into FP8 and transposed, with the amax before."""
    kinds = ("cast", fp8.PLAIN, WIDTH, 2), ("cast of GELU", fp8.GELU, 4 * WIDTH, 2), ("cast through GELU", fp8.GELU_BACKWARD, 4 * WIDTH, 4)
    for what, how, width, bytes_read in kinds:
        cases = [(random(tokens, width), random(tokens, width) if how == fp8.GELU_BACKWARD else None) for tokens in TOKENS]
        works = [lambda x=x, h=h, how=how: fp8.quantize(x, h, None, how, False) for x, h in cases]
        show(what, "", works, [(2 * bytes_read + 2) * width * tokens for tokens in TOKENS])


def main() -> None:
    """Those that are named, or all."""
    print(f"{torch.cuda.get_device_name()}; {' and '.join(f'{tokens:,}' for tokens in TOKENS)} tokens", flush=True)
    measures = {"adaln": measure_adaln, "heads": measure_heads, "accumulate": measure_accumulate, "update": measure_update, "fp8": measure_fp8}
    for name, measure in measures.items():
        if name in sys.argv[1:] or len(sys.argv) == 1:
            measure()


if __name__ == "__main__":
    main()
