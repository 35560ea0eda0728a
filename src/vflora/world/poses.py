"""Does the body still have the character's shape and colours? The best of many poses, and the palette."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vflora.world.atlas import atlas_for
from vflora.world.characters import Domain
from vflora.world.tracking import RAMP, STANDS_OUT, fill_holes

ANGLES = torch.linspace(-0.7, 0.7, 11)
SCALES = torch.tensor([0.92, 1.0, 1.08])
_LEVELS = 33
_WINDOW = 0.56  # side of the window around a character, as a share of the frame


@dataclass(frozen=True)
class Poses:
    """The pose of the true character that covers a tracked body best.

    Attributes:
        iou: intersection over union of the two masks, soft, [B, F].
        phase: its limb phase, int64 [B, F].
        angle: its rotation in radians [B, F].
        palette_error: how far the body's colours are from the character's, wherever on the body they are: sliced
            Wasserstein distance with RGB in [0, 1], [B, F].
    """

    iou: Tensor
    phase: Tensor
    angle: Tensor
    palette_error: Tensor


def best_poses(
    video: Tensor, mask: Tensor, centers: Tensor, characters: Tensor, radius: Tensor, *, domain: Domain
) -> Poses:
    """Compares tracked bodies with the true character in 66 poses (2 phases, 11 angles, 3 scales).

    Args:
        video: [B, 3, F, H, W] in [-1, 1].
        mask: where the body is, 0 to 1, [B, F, H, W].
        centers: the body's centroid, (x, y) in pixels [B, F, 2].
        characters: who it should be [B].
        radius: half the character's size as a share of the frame [B].
        domain: geometric characters or creatures.
    """
    rows = [slice(row, row + 1) for row in range(len(video))]
    parts = [_best_poses(video[row], mask[row], centers[row], characters[row], radius[row], domain) for row in rows]
    return Poses(*(torch.cat([getattr(part, name) for part in parts]) for name in Poses.__dataclass_fields__))


def _best_poses(
    video: Tensor, mask: Tensor, centers: Tensor, characters: Tensor, radius: Tensor, domain: Domain
) -> Poses:
    size, device = video.shape[-1], video.device
    window = round(_WINDOW * size / 2) * 2
    axis = torch.arange(window, device=device) - (window - 1) / 2
    offset = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # [w, w, 2], pixels
    grid = ((centers[0, :, None, None] + offset + 0.5) / size) * 2 - 1
    layers = torch.cat([video[0].transpose(0, 1), mask[0, :, None]], dim=1)  # [F, 4, H, W]
    crops = functional.grid_sample(layers, grid, align_corners=False)
    body = crops[:, 3] * ((grid.abs() <= 1).all(-1))
    rgba, middle = atlas_for(domain, device).look_up(characters)
    poses = _pose_templates(rgba[0].float() / 255, middle[0], offset / (float(radius[0]) * size))
    outlines = _as_tracked(poses[:, 3])
    shared = torch.minimum(body[:, None], outlines).sum((2, 3))
    together = torch.maximum(body[:, None], outlines).sum((2, 3))
    iou, best = (shared / together).max(1)
    phase, turn, _ = torch.unravel_index(best, (2, len(ANGLES), len(SCALES)))
    opaque = poses[best, 3:].clamp_min(1e-3)
    truth = _colour_levels(poses[best, :3] / opaque, outlines[best])
    seen = _colour_levels((crops[:, :3] + 1) / 2, body)
    error = (truth - seen).abs().mean((1, 2))
    return Poses(iou[None], phase[None], ANGLES.to(device)[turn][None], error[None])


def _pose_templates(rgba: Tensor, middle: Tensor, offset: Tensor) -> Tensor:
    """Draws the poses around their centroids: premultiplied RGBA [2 * angles * scales, 4, w, w]."""
    templates = []
    for phase, angle, scale in itertools.product(range(2), ANGLES.tolist(), SCALES.tolist()):
        turn = torch.tensor(angle, device=offset.device)
        x, y = (offset / scale).unbind(-1)
        back = torch.stack([x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()], dim=-1)
        templates.append((phase, back + middle[phase]))
    grid = torch.stack([place for _, place in templates])
    phases = torch.tensor([phase for phase, _ in templates], device=offset.device)
    return functional.grid_sample(rgba[phases], grid, align_corners=False)


def _as_tracked(alpha: Tensor) -> Tensor:
    """Returns the mask that tracking would find: ink stands out even where it covers a third of a pixel."""
    return fill_holes(((1.2 * alpha - STANDS_OUT) / RAMP).clamp(0, 1))


def _colour_levels(colours: Tensor, weight: Tensor) -> Tensor:
    """Returns quantiles of colours along seven directions, [N, 7, levels], for colours [N, 3, w, w]."""
    directions = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1)]
    unit = functional.normalize(torch.tensor(directions, dtype=colours.dtype, device=colours.device), dim=1)
    value, order = torch.einsum("dc,ncp->ndp", unit, colours.flatten(2)).sort(dim=-1)
    # only the inside of the body counts: the edge is mixed with the background
    core = 1 - functional.max_pool2d(1 - weight[:, None], 3, stride=1, padding=1)
    inside = (core > 0.9).to(colours.dtype).flatten(2).expand_as(value).gather(-1, order)
    share = inside.cumsum(-1) / inside.sum(-1, keepdim=True).clamp_min(1)
    levels = torch.linspace(0.02, 0.98, _LEVELS, device=colours.device).expand(*share.shape[:2], _LEVELS)
    index = torch.searchsorted(share.contiguous(), levels.contiguous()).clamp_max(share.shape[-1] - 1)
    return value.gather(-1, index)
