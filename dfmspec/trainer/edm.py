"""EDM: preconditioning, loss and sampler of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based
Generative Models" (arXiv 2206.00364). Symbols and equation numbers are the paper's; everything here is fp32 or fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# Preconditioning (Table 1, column "Ours"; section 5).


def c_skip(sigma: Tensor, sigma_data: float) -> Tensor:
    """Share of the noisy input in the denoised output."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float) -> Tensor:
    """Scale of the network's output."""
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float) -> Tensor:
    """Scale of the network's input: brings it to unit variance."""
    return 1 / (sigma**2 + sigma_data**2).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """What the network is told of the noise level."""
    return sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) of Table 1; makes the weighted loss of an untrained network (F = 0) one at every sigma."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


# Denoiser and loss (equations 7 and 8).


def denoised(F_x: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:  # noqa: N803
    """D(x; sigma), from the network's output F_x on the input c_in x. All broadcast against each other."""
    return c_skip(sigma, sigma_data) * x + c_out(sigma, sigma_data) * F_x


def weighted_error(F_x: Tensor, x: Tensor, y: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:  # noqa: N803
    """lambda(sigma) (D(y + n; sigma) - y)^2, element by element; x is y + n."""
    return loss_weight(sigma, sigma_data) * (denoised(F_x, x, sigma, sigma_data) - y).square()


# Sampling (Algorithm 1 with s_churn = 0: the deterministic second-order Heun solver).


def sigma_steps(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """t_0 > ... > t_{N-1} > t_N = 0 of equation 5, fp64 of shape [num_steps + 1]."""
    if num_steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=torch.float64)
    i = torch.arange(num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    steps = (high + i / (num_steps - 1) * (low - high)) ** rho
    return torch.cat([steps, torch.zeros(1, dtype=torch.float64)])


def sample_heun(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: Tensor) -> Tensor:
    """Algorithm 1: from unit noise to a sample.

    Args:
        denoise: D(x, sigma) of the model; called 2 x len(steps) - 3 times.
        noise: unit Gaussian noise, any shape.
        steps: noise levels as `sigma_steps` gives them.

    Returns:
        The sample, fp64, in the scale of sigma_data.
    """
    x = noise.double() * steps[0]
    for t, t_next in pairwise(steps):
        d = (x - denoise(x, t)) / t  # dx/dt at t
        x_next = x + (t_next - t) * d  # Euler
        if t_next > 0:
            d_next = (x_next - denoise(x_next, t_next)) / t_next  # dx/dt at the Euler point, not at x again
            x_next = x + (t_next - t) * (d + d_next) / 2
        x = x_next
    return x
