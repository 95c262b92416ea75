"""GEMMs whose weights' gradients go where they are summed.

They give the gradients of plain PyTorch, compiled or not; on a GPU also with the GELU inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dfmspec.trainer.ops import gemm
from dfmspec.trainer.ops.buffers import Incoming
from dfmspec.trainer.ops.libraries import QUACK, usable

SHAPES = ((48, 32), (96, 48), (32, 96))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def network(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return gemm.mlp(gemm.linear(x, weights[0]), *weights[1:])


def plain(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    return F.gelu(x @ weights[0].t() @ weights[1].t(), approximate="tanh") @ weights[2].t()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.fixture(params=DEVICES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Inputs in bf16, and what fp64 makes of them."""
    if request.param == "cuda" and not usable(QUACK):
        pytest.skip("needs quack-kernels on Hopper")
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(shape, generator=generator).bfloat16() * 0.3 for shape in ((64, 32), *SHAPES))
    grad = torch.randn(64, 32, generator=generator).bfloat16()
    exact = [t.double().requires_grad_() for t in (x, *weights)]
    output = plain(exact[0], exact[1:])
    gradients = torch.autograd.grad(output, exact, grad.double())
    there = [t.to(request.param).requires_grad_() for t in (x, *weights)]
    return {
        "x": there[0],
        "weights": there[1:],
        "grad": grad.to(request.param),
        "output": output,
        "gradients": gradients,
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_plain_gemms(case: dict[str, Any], compiled: bool) -> None:
    work: Callable[..., torch.Tensor] = (
        torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network
    )
    output = work(case["x"], case["weights"])
    gradients = torch.autograd.grad(output, [case["x"], *case["weights"]], case["grad"])

    assert relative(output, case["output"]) < 1e-2
    assert all(relative(mine, theirs) < 1e-2 for mine, theirs in zip(gradients, case["gradients"], strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_summed_in_fp32_where_they_belong(case: dict[str, Any], compiled: bool) -> None:
    """Twice: the first takes the place of what was there, the second is added."""
    work: Callable[..., torch.Tensor] = (
        torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network
    )
    incoming = Incoming()
    for weight in case["weights"]:
        weight.incoming, weight.main_grad, weight.grad_added_to_main_grad = (
            incoming,
            torch.full(weight.shape, 7.0, device=weight.device),
            False,
        )
    for times, incoming.replace in ((1, True), (2, False)):
        work(case["x"], case["weights"]).backward(case["grad"])
        for weight, expected in zip(case["weights"], case["gradients"][1:], strict=True):
            assert weight.grad_added_to_main_grad
            assert relative(weight.main_grad, times * expected) < 1e-2
