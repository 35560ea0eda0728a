"""Numbers that say whether a video keeps its character and keeps moving. Pure functions of tensors.

Identity and motion pull against each other: a still picture keeps its identity perfectly. So the two are always
reported together, and motion as a ratio to the base model at the same seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vflora.video_io import to_uint8_frames

FRAMES_AT_ONCE = 16
FLOW_SIDE = 256
"""Shorter side, in pixels, at which optical flow is measured, so that its unit does not depend on the video."""


class Embedder(Protocol):
    """Anything that turns pictures into unit vectors of who is in them."""

    def embed(self, images: Tensor) -> Tensor:
        """Maps [B, 3, H, W] in [-1, 1] to unit vectors [B, D]."""
        ...


@dataclass(frozen=True)
class IdentityScores:
    """How like the reference each frame is; all cosines in [-1, 1].

    Attributes:
        cosines: of each frame to the reference.
        mean: over all frames.
        std: over all frames (of the population).
        last_quarter: mean over the last quarter of the frames, where image-to-video models drift most.
        slope: of the straight line through the cosines, per frame; negative means that the character drifts away.
        i2v_subject: 0.4 max cosine to the reference + 0.3 mean + 0.3 min cosine of neighbouring frames, each
            at least 0, after VBench's image-to-video subject score. It hardly sees late drift and likes
            stillness: reported for comparison with other work, not to steer by.
    """

    cosines: tuple[float, ...]
    mean: float
    std: float
    last_quarter: float
    slope: float
    i2v_subject: float

    @property
    def drift(self) -> float:
        """Change of the cosine from the first to the last frame along the straight line."""
        return self.slope * (len(self.cosines) - 1)


@dataclass(frozen=True)
class MotionScores:
    """How much moves.

    Attributes:
        differences: mean absolute difference of each frame to the one before, as a share of full brightness.
        frame_difference: their mean, in [0, 1].
        flow: mean over frame pairs of the 5 % largest optical-flow magnitudes (as in VBench's dynamic degree),
            in per cent of the shorter side per frame; None where OpenCV (the `flow` extra) is not installed.
    """

    differences: tuple[float, ...]
    frame_difference: float
    flow: float | None

    def ratio_to(self, base: MotionScores) -> float:
        """Returns this motion over that of the base model's video from the same seed.

        By optical flow where both have it, since brightness differences also count flicker; 1.0 where neither
        moves, infinity where only the base is still.
        """
        mine, its = (self.frame_difference, base.frame_difference)
        if self.flow is not None and base.flow is not None:
            mine, its = self.flow, base.flow
        if its == 0:
            return 1.0 if mine == 0 else float("inf")
        return mine / its


@dataclass(frozen=True)
class VideoScores:
    """Identity and motion of one video."""

    identity: IdentityScores
    motion: MotionScores


def score_video(video: Tensor, reference: Tensor, embedder: Embedder) -> VideoScores:
    """Scores one video against the picture of its character.

    Args:
        video: [3, F, H, W] in [-1, 1].
        reference: [3, H, W] in [-1, 1]; may have another size.
        embedder: maps pictures to unit vectors; better one that the training did not optimise.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise ValueError(f"a video must be [3, F, H, W], not {list(video.shape)}")
    return VideoScores(
        identity=identity_scores(embed_frames(video, embedder), embed_frames(reference[:, None], embedder)[0]),
        motion=motion_scores(video),
    )


@torch.no_grad()
def embed_frames(video: Tensor, embedder: Embedder) -> Tensor:
    """Returns the unit vector of every frame, fp32 on the CPU [F, D], for a video [3, F, H, W] in [-1, 1]."""
    frames = video.transpose(0, 1).clamp(-1, 1)
    return torch.cat([embedder.embed(part).float().cpu() for part in frames.split(FRAMES_AT_ONCE)])


def identity_scores(frames: Tensor, reference: Tensor) -> IdentityScores:
    """Compares frame embeddings [F, D] with that of the reference [D]; they need not have unit length."""
    frames, reference = F.normalize(frames.double(), dim=-1), F.normalize(reference.double(), dim=-1)
    cosines = frames @ reference
    last = cosines[-max(1, len(cosines) // 4) :]
    neighbours = (frames[1:] * frames[:-1]).sum(-1) if len(frames) > 1 else torch.ones(1, dtype=torch.double)
    subject = (
        0.4 * cosines.max().clamp(min=0) + 0.3 * neighbours.clamp(min=0).mean() + 0.3 * neighbours.min().clamp(min=0)
    )
    return IdentityScores(
        cosines=tuple(cosines.tolist()),
        mean=cosines.mean().item(),
        std=cosines.std(correction=0).item(),
        last_quarter=last.mean().item(),
        slope=_slope(cosines),
        i2v_subject=subject.item(),
    )


def _slope(values: Tensor) -> float:
    """Least-squares slope over 0, 1, 2, ...; 0 for a single value."""
    places = torch.arange(len(values), dtype=values.dtype)
    places = places - places.mean()
    return (places @ values / (places @ places).clamp(min=1e-12)).item()


def motion_scores(video: Tensor) -> MotionScores:
    """Measures the motion of a video [3, F, H, W] in [-1, 1]; a single frame does not move."""
    video = video.float().clamp(-1, 1)
    differences = (video[:, 1:] - video[:, :-1]).abs().mean(dim=(0, 2, 3)) / 2
    return MotionScores(
        differences=tuple(differences.tolist()),
        frame_difference=differences.mean().item() if len(differences) else 0.0,
        flow=top_flow(video) if importlib.util.find_spec("cv2") else None,
    )


def top_flow(video: Tensor) -> float:
    """Returns the mean of the 5 % largest flow magnitudes, in per cent of the shorter side per frame.

    Dense inverse search (Kroeger et al. 2016, arXiv 1603.03590) of OpenCV, on grey frames scaled to a shorter side
    of 256 pixels.

    Args:
        video: [3, F, H, W] in [-1, 1].

    Raises:
        ImportError: where OpenCV (the `flow` extra) is not installed.
    """
    import cv2

    frames = to_uint8_frames(video)
    scale = FLOW_SIDE / min(frames.shape[1:3])
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    grey = [cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=way) for frame in frames]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    tops = []
    for before, after in zip(grey, grey[1:], strict=False):
        flow = search.calc(before, after, np.zeros((*before.shape, 2), np.float32))
        magnitude = np.linalg.norm(flow, axis=-1).ravel()
        count = max(1, int(len(magnitude) * 0.05))
        tops.append(float(np.partition(magnitude, -count)[-count:].mean()))
    return 100 * float(np.mean(tops)) / FLOW_SIDE if tops else 0.0


def teacher_deviation(student: Tensor, teacher: Tensor) -> float:
    """Returns the mean squared error between two velocities of the same shape, computed in fp32."""
    return F.mse_loss(student.float(), teacher.float()).item()


def deviation_by_sigma(
    sigmas: Sequence[float], deviations: Sequence[float], edges: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> dict[str, float]:
    """Averages teacher deviations in bins of noise level; bins without a point are left out.

    Args:
        sigmas: noise level of each point, in [0, 1].
        deviations: the deviation there.
        edges: borders of the bins, rising; each bin contains its upper border, the first also its lower one.

    Returns:
        Means by bin, named like "0.25-0.50".
    """
    bins: dict[str, list[float]] = {}
    for low, high in zip(edges, edges[1:], strict=False):
        inside = [
            value
            for sigma, value in zip(sigmas, deviations, strict=True)
            if low < sigma <= high or (sigma == low == edges[0])
        ]
        if inside:
            bins[f"{low:.2f}-{high:.2f}"] = inside
    return {name: sum(values) / len(values) for name, values in bins.items()}
