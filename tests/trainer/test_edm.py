"""EDM against its closed forms (arXiv 2206.00364)."""

from __future__ import annotations

import pytest
import torch

from dfmspec.trainer import edm

SIGMA_DATA = 0.5


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_an_untrained_network_has_loss_one_at_every_noise_level(sigma: float) -> None:
    """F = 0 and data of the standard deviation sigma_data: E[lambda |D - y|^2] = 1."""
    generator = torch.Generator().manual_seed(0)
    y = SIGMA_DATA * torch.randn(400_000, generator=generator, dtype=torch.float64)
    s = torch.tensor(sigma, dtype=torch.float64)
    x = y + s * torch.randn(400_000, generator=generator, dtype=torch.float64)

    loss = edm.weighted_error(torch.zeros_like(x), x, y, s, SIGMA_DATA).mean()

    assert float(loss) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 50.0])
def test_preconditioning_gives_unit_variance_in_and_out(sigma: float) -> None:
    s = torch.tensor(sigma, dtype=torch.float64)
    variance = s**2 + SIGMA_DATA**2

    assert float(edm.c_in(s, SIGMA_DATA) ** 2 * variance) == pytest.approx(1.0)
    target_variance = (
        SIGMA_DATA**2 * (1 - edm.c_skip(s, SIGMA_DATA)) ** 2 + (edm.c_skip(s, SIGMA_DATA) * s) ** 2
    ) / edm.c_out(s, SIGMA_DATA) ** 2
    assert float(target_variance) == pytest.approx(1.0)


def gaussian_error(num_steps: int) -> float:
    """Relative error of the sampler on Gaussian data, whose optimal denoiser and exact flow are known."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return x * SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)

    steps = edm.sigma_steps(num_steps, 0.002, 80.0, 7.0)
    sample = edm.sample_heun(denoise, torch.ones(1), steps)
    exact = 80.0 * (SIGMA_DATA**2 / (SIGMA_DATA**2 + 80.0**2)) ** 0.5
    return abs(float(sample) / exact - 1)


def test_the_sampler_is_of_second_order() -> None:
    """DFM's re-evaluates at the old point and is of first order: the ratio would be 2."""
    assert gaussian_error(35) / gaussian_error(70) > 3.8
    assert gaussian_error(140) < 1e-3


def test_noise_levels_run_from_sigma_max_to_sigma_min_and_end_in_zero() -> None:
    steps = edm.sigma_steps(18, 0.002, 80.0, 7.0)

    assert (float(steps[0]), float(steps[-1])) == (pytest.approx(80.0), 0.0)
    assert float(steps[-2]) == pytest.approx(0.002)
    assert bool((steps.diff() < 0).all())
