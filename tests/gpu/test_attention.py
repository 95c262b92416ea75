"""The attention back ends agree with plain attention and with one another; so do our kernels for the heads."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dfmspec.trainer.ops.libraries import FLASH_ATTENTION, usable

pytestmark = pytest.mark.gpu

PACKS = {
    "equal": [(256, 77)] * 4,
    "mixed": [(300, 20), (64, 512), (1024, 77), (9, 1)],
    "padding last": [(300, 20), (64, 512), (660, 24)],
    "empty segments": [(300, 20), (64, 512), (0, 36), (1000, 8), (0, 0), (0, 0)],
}
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[tuple[int, int]]) -> torch.Tensor:
    """Segment by segment, in fp64."""
    pieces = zip(
        q.split([a for a, _ in lengths]),
        k.split([b for _, b in lengths]),
        v.split([b for _, b in lengths]),
        strict=True,
    )
    outputs = []
    for mine, keys, values in pieces:
        scores = torch.einsum("qhd,khd->hqk", mine, keys) / q.size(-1) ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values) if len(mine) else mine)
    return torch.cat(outputs)


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("head", [64, 72, 128])
@pytest.mark.parametrize(
    ("implementation", "backend", "dtype"),
    [
        ("transformer_engine", "fused", torch.bfloat16),
        ("transformer_engine", "flash", torch.bfloat16),
        ("local", "fused", torch.bfloat16),
        ("local", "fused", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_back_end_agrees_with_plain_attention(
    implementation: str, backend: str, dtype: torch.dtype, head: int, pack: str, deterministic: bool
) -> None:
    if backend == "flash" and not usable(FLASH_ATTENTION):
        pytest.skip("needs FlashAttention 4 on Hopper")
    from megatron.core.transformer.enums import AttnBackend

    from dfmspec.trainer.data.segments import Pairs
    from dfmspec.trainer.network.attention import PackedAttention

    lengths = PACKS[pack]
    totals = [sum(each) for each in zip(*lengths, strict=True)]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(total, 3, head, generator=generator) for total in (totals[0], totals[1], totals[1])]
    grad = torch.randn(totals[0], 3, head, generator=generator)

    exact = [x.to(dtype).double().requires_grad_() for x in inputs]
    expected = plain(*exact, lengths)
    expected_grads = torch.autograd.grad(expected, exact, grad.to(dtype).double())

    cu = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device="cuda") for each in zip(*lengths, strict=True)]
    bounds = [1 << (max(each) - 1).bit_length() for each in zip(*lengths, strict=True)]
    pairs = Pairs(*cu, tuple(lengths), len(lengths) if len(set(lengths)) == 1 else 0, *bounds, (0, totals[1]))
    attention = PackedAttention(
        SimpleNamespace(
            transformer_impl=implementation,
            params_dtype=dtype,
            attention_backend=AttnBackend[backend],
            deterministic_mode=deterministic,
        )
    )
    leaves = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    got = attention(*leaves, pairs)
    grads = torch.autograd.grad(got, leaves, grad.to("cuda", dtype))

    for mine, theirs in zip((got, *grads), (expected, *expected_grads), strict=True):
        assert mine.isfinite().all()
        assert (mine.cpu().double() - theirs).norm() <= LIMITS[dtype] * theirs.norm()


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("parts", "normed"), [(3, 2), (2, 1), (1, 1)])
def test_heads_are_cut_and_normed(parts: int, normed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfmspec.trainer.ops.kernels import heads

    monkeypatch.setattr(heads, "_PROGRAMS", 2)  # so that one sums over several tiles
    tokens, count, width = 70, 3, 72
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, count * parts * width, generator=generator)
    weights = [torch.randn(width, generator=generator) for _ in range(normed)]
    grads = [torch.randn(tokens, count, width, generator=generator) for _ in range(parts)]

    exact = [t.to(dtype).double().requires_grad_() for t in (x, *weights)]
    pieces = exact[0].view(tokens, count, parts, width).unbind(2)
    expected = [
        F.rms_norm(piece, (width,), weight, 1e-6) for piece, weight in zip(pieces, exact[1:], strict=False)
    ] + list(pieces[normed:])
    expected_grads = torch.autograd.grad(expected, exact, [g.to(dtype).double() for g in grads])

    leaves = [t.to("cuda", dtype).requires_grad_() for t in (x, *weights)]
    x_amax = torch.zeros((), device="cuda", requires_grad=True)
    got = heads.heads(leaves[0], leaves[1:], parts, width, 1e-6, x_amax)
    *got_grads, d_amax = torch.autograd.grad(got, [*leaves, x_amax], [g.to("cuda", dtype) for g in grads])
    assert d_amax == got_grads[0].abs().max()

    limit = 1e-6 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip((*got, *got_grads), (*expected, *expected_grads), strict=True):
        assert (mine.cpu().double() - theirs).norm() <= limit * theirs.norm()


@pytest.mark.parametrize("e5m2", [False, True])
@pytest.mark.parametrize("shape", [(32, 48), (200, 1152), (4096, 72)])
def test_casts_to_fp8_are_torchs(shape: tuple[int, int], e5m2: bool) -> None:
    from dfmspec.trainer.ops import fp8

    kind = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16) * 100
    h = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16) * 2
    for how in ({}, {"gelu": True}, {"through_gelu_of": h}):
        kept = torch.bfloat16 if "through_gelu_of" in how else torch.float32  # that gradient is rounded once before
        got = fp8.quantized(x, kind, **how)
        expected = fp8.quantized(
            x.to("cpu", kept),
            kind,
            **{key: value.cpu() if key == "through_gelu_of" else value for key, value in how.items()},
        )

        assert torch.allclose(
            got.scale_inv.cpu(), expected.scale_inv, rtol=1e-3 if how else 1e-5
        )  # the processor's own tanh
        values = [each.rows.float().cpu() * each.scale_inv.cpu() for each in (got, expected)]
        assert (values[0] - values[1]).norm() <= (1e-2 if how else 1e-3) * values[
            1
        ].norm()  # a value on the edge may round the other way
        assert torch.equal(got.columns.float(), got.rows.float().t())


def test_a_cast_makes_nan_of_what_is_beyond_the_amax_that_it_is_given() -> None:
    from dfmspec.trainer.ops import fp8
    from dfmspec.trainer.ops.amax import E4M3

    x = torch.randn(200, 144, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    amax = x.abs().max().float()
    found, given, halved = (
        fp8.quantized(x, E4M3),
        fp8.quantized(x, E4M3, amax=amax),
        fp8.quantized(x, E4M3, amax=amax / 2),
    )

    assert all(torch.equal(mine.float(), theirs.float()) for mine, theirs in zip(given, found, strict=True))
    assert torch.equal(halved.rows.float().isnan(), x.abs() > amax / 2)
    assert torch.equal(halved.columns.float().isnan(), (x.abs() > amax / 2).t())
