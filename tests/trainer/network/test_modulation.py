"""The fused modulation agrees with plain PyTorch, values and gradients, whatever the segments."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dfmspec.trainer.data.segments import CHUNK, Rows, rows_of
from dfmspec.trainer.network.modulation import gated, gated_modulate, modulate
from dfmspec.trainer.ops.amax import WithAmax, amax_of

LENGTHS = [[5, 17, 16, 0, 40, 1], [32, 32], [1], [100, 0]]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def everything(x: torch.Tensor, y: torch.Tensor, modulations: torch.Tensor, rows: Rows) -> list[torch.Tensor]:
    """All three functions in a chain; the gradients of x, y and the modulations; the amax beside z and y's gradient."""
    gate, shift, scale = modulations.chunk(3, -1)
    y_amax = [torch.zeros((), dtype=torch.float32, device=y.device, requires_grad=True) for _ in range(2)]
    once, again = y * 1, y * 1
    x0, z = modulate(x, shift, scale, rows, 1e-6, wants_amax=True)
    x1, z1 = gated_modulate(x0, WithAmax(once, y_amax[0]), gate, shift, scale, rows, 1e-6, wants_amax=True)
    outputs = [z.values, x1, z1.values, gated(x1, WithAmax(again, y_amax[1]), gate, rows)]
    weights = [
        torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out) for i, out in enumerate(outputs)
    ]
    total = sum((out * weight).sum(dtype=torch.float64) for out, weight in zip(outputs, weights, strict=True))
    *gradients, d_once, d_again, amax_once, amax_again = torch.autograd.grad(
        total, [x, y, modulations, once, again, *y_amax]
    )  # type: ignore[arg-type]
    for values, amax in ((z.values, z.amax), (z1.values, z1.amax), (d_once, amax_once), (d_again, amax_again)):
        assert amax == amax_of(values)
    return outputs + gradients


def made(
    lengths: list[int], width: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Rows]:
    of_token = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = rows_of(of_token, len(lengths))
    rows = Rows(rows.of_token.to(device), rows.chunks.to(device), rows.starts.to(device))
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), width), (sum(lengths), width), (len(lengths), 3 * width)]
    x, y, m = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    return x, y, m, rows


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunks_cover_each_row_once_and_stay_in_their_segment(lengths: list[int]) -> None:
    rows = rows_of(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)), len(lengths))
    covered = [(row, int(segment)) for first, end, segment in rows.chunks for row in range(first, end)]
    assert covered == list(enumerate(rows.of_token.tolist()))
    of_chunks = [[int(rows.chunks[at, 2]) for at in range(first, end)] for first, end in pairwise(rows.starts.tolist())]
    assert of_chunks == [[segment] * -(-count // CHUNK) for segment, count in enumerate(lengths)]
    assert len(rows.chunks) == -(-sum(lengths) // CHUNK) + len(lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("width", [24, 1152])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_kernels_agree_with_plain_pytorch(lengths: list[int], width: int, dtype: torch.dtype) -> None:
    expected = everything(*made(lengths, width, torch.float64, "cpu"))
    got = everything(*made(lengths, width, dtype, "cuda"))
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine.cpu().double() - theirs).norm() <= LIMITS[dtype] * theirs.norm()
    again = everything(*made(lengths, width, dtype, "cuda"))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
