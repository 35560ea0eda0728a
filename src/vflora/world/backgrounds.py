"""Calm backgrounds: a soft sky and two rows of hills that drift by, muted so that the character is the subject."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sample_backgrounds(count: int, generator: torch.Generator) -> Tensor:
    """Draws the numbers of backgrounds, [count, 15].

    They are base hue, hue shift, lightness, saturation; drift; and for each of two rows of hills height, amplitude,
    waves, phase, shade.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def signed(low: float, high: float) -> Tensor:
        return uniform(low, high) * (torch.randint(2, (count,), generator=generator) * 2 - 1)

    sky = [uniform(0, 1), uniform(-0.12, 0.12), uniform(0.62, 0.84), uniform(0.10, 0.24)]
    drift = [signed(0.002, 0.005)]
    far = [uniform(0.35, 0.65), uniform(0.02, 0.07), uniform(0.8, 1.7), uniform(0, 1), uniform(0.04, 0.07)]
    near = [uniform(0.65, 0.92), uniform(0.02, 0.05), uniform(1.0, 2.2), uniform(0, 1), uniform(0.05, 0.08)]
    return torch.stack([*sky, *drift, *far, *near], dim=1)


def draw_backgrounds(backdrop: Tensor, frames: int, size: int) -> Tensor:
    """Draws backgrounds.

    Args:
        backdrop: numbers from `sample_backgrounds` [B, 15].
        frames: F.
        size: side of the frames in pixels.

    Returns:
        Colours in [0, 1], [B, F, 3, size, size].
    """
    device = backdrop.device
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    x, y = axis.view(1, 1, 1, size), axis.view(1, 1, size, 1)
    time = torch.arange(frames, device=device).view(1, frames, 1, 1)
    hue, shift, light, grey, drift, *hills = (column.view(-1, 1, 1, 1) for column in backdrop.unbind(1))
    top = light + 0.05
    lightness = top - 0.07 * y
    lightness = lightness.expand(len(backdrop), frames, size, size)
    for speed, (height, swell, waves, phase, shade) in ((0.6, hills[:5]), (1.0, hills[5:])):
        where = waves * (x + drift * speed * time) + phase
        ridge = height - swell * torch.sin(math.tau * where) - 0.4 * swell * torch.sin(2 * math.tau * where + 1.0)
        covered = ((y - ridge) * size + 0.5).clamp(0, 1)
        lightness = lightness - shade * covered
    tint = (hue + shift * (y - 0.5)).unsqueeze(2)  # [B, 1, 1, size, 1]
    channel = torch.tensor([0.0, 1 / 3, 2 / 3], device=device).view(1, 1, 3, 1, 1)
    chroma = grey.unsqueeze(2) * 0.5 * torch.cos(math.tau * (tint - channel))
    return (lightness.unsqueeze(2) + chroma * (1.15 - lightness.unsqueeze(2))).clamp(0, 1)
