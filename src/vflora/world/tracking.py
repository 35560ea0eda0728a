"""Where is the character in a video, with nothing known but the pixels?

Backgrounds of the world are smooth and muted. A smooth surface fitted to each frame, robustly, is therefore a
good guess of the background, and what stands out from it is the character. Clips with posts cannot be tracked
this way: a post stands out as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vflora.world.scenes import HEADINGS

STANDS_OUT = 0.28
"""Difference to the background, in units of [-1, 1], from which a pixel belongs to the character."""
RAMP = 0.15
"""Difference from there on, over which it comes to belong to it wholly."""
_FITS = 5
_SHIFTS = 4


@dataclass(frozen=True)
class Track:
    """A character's way through a video.

    Attributes:
        mask: how surely each pixel belongs to it, 0 to 1, [B, F, H, W].
        centers: its centroid, (x, y) in pixels [B, F, 2]; the middle of the frame where nothing stands out.
        area: pixels that belong to it [B, F].
    """

    mask: Tensor
    centers: Tensor
    area: Tensor


def track(video: Tensor) -> Track:
    """Follows the character.

    Args:
        video: [B, 3, F, H, W] in [-1, 1].
    """
    frames = video.float().transpose(1, 2)  # [B, F, 3, H, W]
    difference = (frames - _fit_background(frames)).abs().amax(2)
    mask = fill_holes(((difference - STANDS_OUT) / RAMP).clamp(0, 1))
    centers = _centroids(mask)
    reach = video.shape[-1] / 5
    near = mask
    for _ in range(_SHIFTS):  # pieces far from the body, such as ghosts, lose their say
        near = mask * _window(centers, mask.shape[-2:], reach)
        centers = _centroids(near)
    inside = (_window(centers, mask.shape[-2:], reach) > 0.1).to(mask.dtype)
    return Track(mask * inside, _centroids(mask * inside), (mask * inside).sum((2, 3)))


def fill_holes(mask: Tensor) -> Tensor:
    """Fills what the mask encloses on all four sides, such as pale faces; [..., H, W]."""
    sides = [mask.cummax(axis).values for axis in (-1, -2)]
    sides += [mask.flip(axis).cummax(axis).values.flip(axis) for axis in (-1, -2)]
    return torch.stack(sides).amin(0)


def _fit_background(frames: Tensor) -> Tensor:
    """Fits a quadratic surface per frame and channel, by least squares that forget what lies far off."""
    height, width = frames.shape[-2:]
    y = torch.linspace(-1, 1, height, device=frames.device)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width, device=frames.device)[None].expand(height, width)
    basis = torch.stack([torch.ones_like(x), x, y, x * y, x * x, y * y, y**3], dim=-1).flatten(0, 1)  # [HW, 7]
    pixels = frames.flatten(3).transpose(2, 3)  # [B, F, HW, 3]
    weight = torch.ones_like(pixels[..., :1])
    surface = pixels
    for fit in range(_FITS):
        weighted = basis * weight  # [B, F, HW, 7]
        square = weighted.transpose(-1, -2) @ basis + 1e-4 * torch.eye(basis.shape[1], device=frames.device)
        surface = basis @ torch.linalg.solve(square, weighted.transpose(-1, -2) @ pixels)
        off = (pixels - surface).abs().amax(-1, keepdim=True)
        scale = max(0.4 * 0.6**fit, 0.12)
        weight = 1 / (1 + (off / scale) ** 4)
    return surface.transpose(2, 3).reshape(frames.shape)


def _centroids(mask: Tensor) -> Tensor:
    height, width = mask.shape[-2:]
    x = torch.arange(width, device=mask.device, dtype=mask.dtype)
    y = torch.arange(height, device=mask.device, dtype=mask.dtype)[:, None]
    weight = mask.sum((2, 3))
    middle = torch.stack([(mask * x).sum((2, 3)), (mask * y).sum((2, 3))], dim=-1)
    frame = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=mask.device)
    return torch.where(weight[..., None] > 1, middle / weight[..., None].clamp_min(1), frame)


def _window(centers: Tensor, size: torch.Size, reach: float) -> Tensor:
    x = torch.arange(size[1], device=centers.device) - centers[..., 0, None, None]
    y = torch.arange(size[0], device=centers.device)[:, None] - centers[..., 1, None, None]
    return torch.exp(-(x * x + y * y) / (2 * reach * reach))


def path_length(centers: Tensor) -> Tensor:
    """Returns the length of each path [B], in the unit of `centers` [B, F, 2]."""
    return centers.diff(dim=1).norm(dim=-1).sum(1)


def path_direction(centers: Tensor) -> Tensor:
    """Returns the index into DIRECTIONS that the way from the first to the last frame is nearest to, [B]."""
    return ((centers[:, -1] - centers[:, 0]) @ HEADINGS.to(centers).T).argmax(1)
