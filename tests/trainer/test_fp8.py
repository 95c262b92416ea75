"""FP8 products: near those they stand for, in both directions; and numbers that are not finite do not pass for some."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfmspec.trainer import fp8
from dfmspec.trainer.gradients import Incoming


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().cpu().float() - expected.detach()).norm() / expected.detach().norm())


DEVICES = [("cpu", torch.float32), pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu)]
"""Where, and in what the layers compute."""


def exact_and_there(kind: tuple[str, torch.dtype], *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Leaves of the same values in fp32, and where they are tried."""
    there = [x.to(*kind) for x in inputs]
    return [x.to("cpu", torch.float32).requires_grad_() for x in there], [x.requires_grad_() for x in there]


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e5], ids=str)
@pytest.mark.parametrize("kind", DEVICES, ids=str)
def test_a_product_and_its_gradients_are_near_the_exact_ones(kind: tuple[str, torch.dtype], size: float) -> None:
    """The scales follow the values: a tensor a million times smaller loses no more."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 48, generator=generator) * size, torch.randn(32, 48, generator=generator) * 0.02
    grad = torch.randn(64, 32, generator=generator) * size
    exact, leaves = exact_and_there(kind, x, weight)
    expected, got = exact[0] @ exact[1].t(), fp8.linear(*leaves)
    expected.backward(grad)
    got.backward(grad.to(*kind))

    assert relative(got, expected) < 0.05  # E4M3 keeps 3 bits after the point, E5M2 2
    assert all(relative(mine.grad, theirs.grad) < 0.08 for mine, theirs in zip(leaves, exact, strict=True))


@pytest.mark.parametrize("kind", DEVICES, ids=str)
def test_an_mlp_is_near_the_exact_one(kind: tuple[str, torch.dtype]) -> None:
    generator = torch.Generator().manual_seed(0)
    exact, leaves = exact_and_there(kind, *(torch.randn(shape, generator=generator) for shape in ((64, 48), (96, 48), (32, 96))))
    grad = torch.randn(64, 32, generator=generator)
    expected, got = F.gelu(exact[0] @ exact[1].t(), approximate="tanh") @ exact[2].t(), fp8.mlp(*leaves)
    expected.backward(grad)
    got.backward(grad.to(*kind))

    assert relative(got, expected) < 0.08
    assert all(relative(mine.grad, theirs.grad) < 0.12 for mine, theirs in zip(leaves, exact, strict=True))


def test_the_compiler_sees_through_it() -> None:
    """A product that broke its graph would cost more than it saves."""
    weights = [torch.randn(shape, requires_grad=True) for shape in ((48, 32), (96, 48), (32, 96))]
    work = torch.compile(lambda x: fp8.mlp(fp8.linear(x, weights[0]), *weights[1:]).sum(), fullgraph=True, backend="aot_eager")

    work(torch.randn(16, 32, requires_grad=True)).backward()
    assert all(weight.grad.any() for weight in weights)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_go_where_they_are_summed(device: str) -> None:
    """The same numbers as without a buffer, replaced once and added once."""
    generator = torch.Generator().manual_seed(0)
    x, *inputs = (torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in ((64, 32), (48, 32), (96, 48), (32, 96)))

    def backward(weights: list[torch.Tensor]) -> None:
        fp8.mlp(fp8.linear(x, weights[0]), *weights[1:]).sum().backward()

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


def test_zeros_stay_zeros_and_the_largest_value_is_met_exactly() -> None:
    assert not fp8.linear(torch.zeros(16, 16), torch.zeros(16, 16)).any()
    quantized = fp8.quantized(torch.tensor([[3.7, 0.0], [0.0, -1.0]]), fp8.E4M3)

    assert quantized.rows[0, 0].float() * quantized.inverse == pytest.approx(3.7)
    assert torch.equal(quantized.rows.t().float(), quantized.columns.float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_come_through(value: float) -> None:
    x = torch.ones(16, 16)
    x[3, 5] = value

    assert not fp8.linear(x, torch.ones(16, 16)).isfinite().all()
