"""FP8 GEMMs: near those they stand for, in both directions; and numbers that are not finite do not pass for some."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfmspec.trainer.ops import fp8
from dfmspec.trainer.ops.amax import E4M3, WithAmax, amax_of, with_amax, with_gradient_amax
from dfmspec.trainer.ops.buffers import Incoming


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return fp8.linear(WithAmax(x), weight, wants_gradient_amax=False).values


def mlp(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return fp8.mlp(WithAmax(x), *weights, wants_gradient_amax=False).values


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().cpu().float() - expected.detach().cpu()).norm() / expected.detach().cpu().norm())


DEVICES = [("cpu", torch.float32), pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu)]
"""Where, and in what the layers compute."""


def exact_and_there(
    kind: tuple[str, torch.dtype], *inputs: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Leaves of the same values in fp32, and where they are tried."""
    there = [x.to(*kind) for x in inputs]
    return [x.to("cpu", torch.float32).requires_grad_() for x in there], [x.requires_grad_() for x in there]


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e5], ids=str)
@pytest.mark.parametrize("kind", DEVICES, ids=str)
def test_a_gemm_and_its_gradients_are_near_the_exact_ones(kind: tuple[str, torch.dtype], size: float) -> None:
    """The scales follow the values: a tensor a million times smaller loses no more."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 48, generator=generator) * size, torch.randn(32, 48, generator=generator) * 0.02
    grad = torch.randn(64, 32, generator=generator) * size
    exact, leaves = exact_and_there(kind, x, weight)
    expected, got = exact[0] @ exact[1].t(), linear(*leaves)
    expected.backward(grad)
    got.backward(grad.to(*kind))

    assert relative(got, expected) < 0.05  # E4M3 keeps 3 bits after the point, E5M2 2
    assert all(relative(mine.grad, theirs.grad) < 0.08 for mine, theirs in zip(leaves, exact, strict=True))


@pytest.mark.parametrize("kind", DEVICES, ids=str)
def test_an_mlp_is_near_the_exact_one(kind: tuple[str, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    exact, leaves = exact_and_there(
        kind, *(torch.randn(shape, generator=generator) for shape in ((64, 48), (96, 48), (32, 96)))
    )
    grad = torch.randn(64, 32, generator=generator)
    expected, got = F.gelu(exact[0] @ exact[1].t(), approximate="tanh") @ exact[2].t(), mlp(*leaves)
    expected.backward(grad)
    got.backward(grad.to(*kind))

    assert relative(got, expected) < 0.08
    assert all(relative(mine.grad, theirs.grad) < 0.12 for mine, theirs in zip(leaves, exact, strict=True))


def through(kind: str, along: bool, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """A GEMM whose input and whose output's gradient come with their amax, or without."""
    work = fp8.linear if kind == "linear" else fp8.mlp
    return (
        with_gradient_amax(work(with_amax(x.cos(), wanted=along), *weights, wants_gradient_amax=along)).square().sum()
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("where", DEVICES, ids=str)
def test_an_amax_that_comes_along_is_the_one_that_would_be_found(
    where: tuple[str, torch.dtype], kind: str, compiled: bool
) -> None:
    """Forward with a matrix and backward with its gradient: the same bits."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(*where) for shape in ((64, 48), (96, 48), (32, 96))]
    function = torch.compile(through, fullgraph=True, backend="aot_eager") if compiled else through

    def gradients(along: bool) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs[: 2 if kind == "linear" else 3]]
        return list(torch.autograd.grad(function(kind, along, *leaves), leaves))

    assert all(torch.equal(*pair) for pair in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize(("forward", "backward"), [(0.5, 1.0), (1.0, 0.5), (1.0, 0.0)])
def test_an_amax_of_something_else_does_not_pass_unseen(
    kind: str, forward: float, backward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero is what autograd has for an amax that nobody gave a gradient."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((64, 48), (96, 48), (32, 96))]
    monkeypatch.setattr("dfmspec.trainer.ops.amax.amax_of", lambda x: amax_of(x) * forward)
    loss = through(kind, True, *leaves[: 2 if kind == "linear" else 3])
    monkeypatch.setattr("dfmspec.trainer.ops.amax.amax_of", lambda x: amax_of(x) * backward)

    assert loss.isfinite() == (forward == 1)
    assert torch.autograd.grad(loss, leaves[0])[0].isnan().any()


@pytest.mark.parametrize("made_of", [{"gelu": True}, {"through_gelu_of": torch.ones(16, 16)}], ids=str)
def test_an_amax_is_of_the_matrix_and_not_of_what_is_made_of_it(made_of: dict[str, bool | torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="not that of its GELU"):
        fp8.quantized(torch.ones(16, 16), E4M3, amax=torch.ones(()), **made_of)  # type: ignore[arg-type]


def test_the_compiler_sees_through_it() -> None:
    """A GEMM that broke its graph would cost more than it saves."""
    weights = [torch.randn(shape, requires_grad=True) for shape in ((48, 32), (96, 48), (32, 96))]
    work = torch.compile(lambda x: mlp(linear(x, weights[0]), *weights[1:]).sum(), fullgraph=True, backend="aot_eager")

    work(torch.randn(16, 32, requires_grad=True)).backward()
    assert all(weight.grad.any() for weight in weights)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_go_where_they_are_summed(device: str) -> None:
    """The same numbers as without a buffer, replaced once and added once."""
    generator = torch.Generator().manual_seed(0)
    x, *inputs = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((64, 32), (48, 32), (96, 48), (32, 96))
    )

    def backward(weights: list[torch.Tensor]) -> None:
        mlp(linear(x, weights[0]), *weights[1:]).sum().backward()

    apart, together = ([weight.clone().requires_grad_() for weight in inputs] for _ in range(2))
    incoming = Incoming()
    backward(apart)
    for weight in together:
        weight.incoming, weight.main_grad = incoming, torch.full(weight.shape, 7.0, device=device)
    for times, incoming.replace in ((1, True), (2, False)):
        backward(together)
        for mine, theirs in zip(together, apart, strict=True):
            assert mine.grad_added_to_main_grad  # or DDP would add what only stands for it
            assert relative(mine.main_grad, times * theirs.grad.float()) < 5e-3  # theirs is in bf16


def test_zeros_stay_zeros_and_the_amax_is_met_exactly() -> None:
    assert not linear(torch.zeros(16, 16), torch.zeros(16, 16)).any()
    quantized = fp8.quantized(torch.tensor([[3.7, 0.0], [0.0, -1.0]]), E4M3)

    assert quantized.rows[0, 0].float() * quantized.scale_inv == pytest.approx(3.7)
    assert torch.equal(quantized.rows.t().float(), quantized.columns.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_come_through(value: float) -> None:
    x = torch.ones(16, 16)
    x[3, 5] = value

    assert not linear(x, torch.ones(16, 16)).isfinite().all()
