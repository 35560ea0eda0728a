"""The flow-matching path that HunyuanVideo-1.5 was trained on. Pure functions.

Source: x_t = (1 - sigma) x0 + sigma noise (rectified flow, Liu et al. 2022, arXiv 2209.03003, eq. 1), with the
time shift sigma' = s sigma / (1 + (s - 1) sigma) of Esser et al. 2024 (arXiv 2403.03206, section 5.3.2).
"""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS_PER_UNIT = 1000.0
"""The transformer is told 1000 sigma."""


def sampling_sigmas(steps: int, shift: float) -> Tensor:
    """Returns the shifted schedule from 1 to 0, fp32 [steps + 1].

    Equal to what the diffusers scheduler makes of `sigmas=linspace(1, 0, steps + 1)[:-1]`.
    """
    uniform = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return (shift * uniform / (1 + (shift - 1) * uniform)).float()


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Returns x_t for clean latents and noise of the same shape."""
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Returns d x_t / d sigma = noise - clean."""
    return noise - clean


def clean_estimate(latents: Tensor, sigma: Tensor | float, velocity: Tensor) -> Tensor:
    """Returns the one-step estimate x0 = x_t - sigma v, in the precision of the inputs."""
    return latents - sigma * velocity


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """Returns the latents at the next, lower noise level."""
    return latents + (next_sigma - sigma) * velocity
