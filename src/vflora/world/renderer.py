"""Turns scenes into videos with their ground truth, all clips at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from vflora.errors import UserError
from vflora.world.atlas import atlas_for
from vflora.world.backgrounds import draw_backgrounds, sample_backgrounds
from vflora.world.characters import Domain
from vflora.world.scenes import HEADINGS, POST_HALF_WIDTH, Scenes, limb_phases, paths

SUPERSAMPLING = 2
_FRAMES_AT_ONCE = {"cpu": 68, "other": 4352}  # bounds memory: about 1 MB a frame of 64 x 64


@dataclass(frozen=True)
class Clips:
    """Videos and what is true about them.

    Attributes:
        video: fp32 [B, 3, F, H, W] in [-1, 1].
        mask: how much of each pixel is visible body, 0 to 1, [B, F, H, W].
        centers: the body's centroid, (x, y) in pixels [B, F, 2]; whether hidden or not.
        phases: limb phase, int64 [B, F].
    """

    video: Tensor
    mask: Tensor
    centers: Tensor
    phases: Tensor


def render(scenes: Scenes, *, size: int = 64, device: torch.device | str = "cpu") -> Clips:
    """Renders clips.

    Args:
        scenes: what to render, on any device.
        size: side of the square frames in pixels.
        device: where to render.

    Raises:
        UserError: if `size` is too small to show anything.
    """
    if size < 16:
        raise UserError(f"frames of {size} pixels show nothing: use 16 or more.")
    place = torch.device(device)
    budget = _FRAMES_AT_ONCE["cpu" if place.type == "cpu" else "other"] * 64**2
    step = max(1, budget // (scenes.frames * size**2))
    parts = [_render(scenes.select(slice(i, i + step)), size, place) for i in range(0, len(scenes), step)]
    return Clips(*(torch.cat([getattr(part, name) for part in parts]) for name in Clips.__dataclass_fields__))


def render_stills(
    characters: Tensor,
    *,
    domain: Domain,
    generator: torch.Generator,
    size: int = 64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Renders still pictures, every one in another place, size, pose and light.

    Args:
        characters: numbers within the domain [B].
        domain: geometric characters or creatures.
        generator: a CPU generator.
        size: side of the pictures in pixels.
        device: where to render.

    Returns:
        fp32 [B, 3, size, size] in [-1, 1].
    """
    return render(still_scenes(characters, domain=domain, generator=generator), size=size, device=device).video[:, :, 0]


def still_scenes(characters: Tensor, *, domain: Domain, generator: torch.Generator) -> Scenes:
    """Draws scenes of one frame: the pictures that a folder of stills holds."""
    count = len(characters)

    def uniform(low: float, high: float, *more: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *more, generator=generator)

    zero = torch.zeros(count, dtype=torch.int64)
    return Scenes(
        domain=domain,
        frames=1,
        character=characters.cpu(),
        motion=zero,
        direction=zero,
        speed=zero,
        start=0.5 + uniform(-5.0, 5.0, 2) / 64,
        radius=uniform(11.0, 14.5) / 64,
        tilt=uniform(-0.35, 0.35),
        spin=torch.zeros(count),
        phase=torch.randint(2, (count,), generator=generator),
        post=torch.full((count,), torch.inf),
        backdrop=sample_backgrounds(count, generator),
    )


def _render(scenes: Scenes, size: int, device: torch.device) -> Clips:
    scenes = scenes.to(device)
    phases = limb_phases(scenes)
    rgba, middles = atlas_for(scenes.domain, device).look_up(scenes.character)
    row = torch.arange(len(scenes), device=device)[:, None]
    route = scenes.start[:, None] + paths(scenes.motion, scenes.direction, scenes.speed, scenes.frames)
    sprites = _place(rgba[row, phases], route, _angles(scenes), scenes.radius, size)
    sprites = sprites * (1 - _posts(scenes, size))[:, None, None]
    colour, mask = sprites[:, :, :3], sprites[:, :, 3]
    scenery = draw_backgrounds(scenes.backdrop, scenes.frames, size)
    scenery = scenery * (1 - 0.35 * _posts(scenes, size)[:, None, None])
    video = (colour + (1 - mask.unsqueeze(2)) * scenery) * 2 - 1
    middle = _rotate(middles[row, phases], _angles(scenes)) * scenes.radius[:, None, None]
    return Clips(video.transpose(1, 2).contiguous(), mask, (route + middle) * size - 0.5, phases)


def _angles(scenes: Scenes) -> Tensor:
    time = torch.arange(scenes.frames, device=scenes.tilt.device) / max(1, scenes.frames - 1)
    return scenes.tilt[:, None] + scenes.spin[:, None] * time


def _rotate(point: Tensor, angle: Tensor) -> Tensor:
    x, y = point.unbind(-1)
    return torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=-1)


def _place(rgba: Tensor, route: Tensor, angles: Tensor, radius: Tensor, size: int) -> Tensor:
    """Puts drawings [B, F, 4, S, S] into frames: premultiplied RGBA [B, F, 4, size, size]."""
    clips, frames = route.shape[:2]
    fine = size * SUPERSAMPLING
    axis = (torch.arange(fine, device=route.device, dtype=torch.float32) + 0.5) / fine
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    offset = torch.stack([x, y], dim=-1) - route[:, :, None, None]
    grid = _rotate(offset, -angles[:, :, None, None]) / radius.view(-1, 1, 1, 1, 1)
    sprites = torch.nn.functional.grid_sample(
        rgba.flatten(0, 1).float() / 255, grid.flatten(0, 1), mode="bilinear", align_corners=False
    )
    sprites = torch.nn.functional.avg_pool2d(sprites, SUPERSAMPLING)
    return sprites.view(clips, frames, 4, size, size)


def _posts(scenes: Scenes, size: int) -> Tensor:
    """Returns where a post hides what is behind it, 0 to 1, [B, size, size]."""
    device = scenes.start.device
    heading = HEADINGS.to(device)[scenes.direction]
    axis = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
    sideways = (scenes.direction < 2).view(-1, 1, 1)
    position = torch.where(sideways, axis.view(1, 1, -1), axis.view(1, -1, 1))
    middle = ((scenes.start + heading * scenes.post.nan_to_num(posinf=9.0)[:, None]) * heading.abs()).sum(1)
    distance = (position - middle.view(-1, 1, 1)).abs() - POST_HALF_WIDTH
    return cast(Tensor, (0.5 - distance * size).clamp(0, 1)).expand(-1, size, size)
