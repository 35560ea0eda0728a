"""The objective. Pure functions: tensors in, scalars out."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distillation_loss(student_velocity: Tensor, teacher_velocity: Tensor) -> Tensor:
    """Mean squared error between velocities [B, C, T, H, W], unweighted. Source: mission, section 4.1."""
    return torch.nn.functional.mse_loss(student_velocity, teacher_velocity)


def identity_loss(frames: Tensor, anchors: Tensor, margin: float = 0.0) -> tuple[Tensor, Tensor]:
    """L_id = mean_k max(0, 1 - cos(g(frame_k), g(anchor)) - margin).

    Source: mission, section 4.2; the hinge follows ReFL (Xu et al. 2023, arXiv 2304.05977, eq. 5).

    Args:
        frames: unit embeddings of sampled frames [B, K, D].
        anchors: unit embeddings of the anchors [B, D].
        margin: distance below which a frame presses no further.

    Returns:
        The loss, a scalar, and the cosines [B, K], detached.
    """
    cosines = (frames * anchors[:, None]).sum(dim=-1)
    return (1 - cosines - margin).clamp_min(0).mean(), cosines.detach()


def identity_weight(step: int, *, peak: float, schedule: str, warmup_steps: int, every_steps: int) -> float:
    """Returns lambda of optimizer step `step`, counted from 0; 0.0 on the steps that skip the identity loss."""
    if step % every_steps:
        return 0.0
    if schedule == "constant" or step >= warmup_steps:
        return peak
    progress = step / warmup_steps
    return peak * (progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2)


def frame_buckets(frames: int, count: int, generator: torch.Generator) -> list[int]:
    """Draws `count` frame indices, one from each of `count` equal parts of frames 1 to `frames` - 1.

    Frame 0 is the reference itself and teaches nothing. Equal parts reach the last quarter, where identity
    drifts most; the reference implementation's buckets hardly ever did. With fewer frames than parts,
    every frame is taken.
    """
    available = frames - 1
    if available <= count:
        return list(range(1, frames)) or [0]
    bounds = [round(i * available / count) for i in range(count + 1)]
    return [
        1 + int(torch.randint(low, high, (), generator=generator))
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
