"""Rendered clips kept on the accelerator, a part of them replaced all the time, so that training never waits."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vflora.random_streams import keyed_generator, keyed_seed
from vflora.world.characters import Domain, Split
from vflora.world.renderer import render
from vflora.world.scenes import sample_scenes

SPLITS: dict[Domain, Split] = {"geometric": "train", "creatures": "general"}
"""What pretraining may see: of the creatures only those that belong to no split of the experiments."""


class ClipPool:
    """A ring of clips from one or more domains, drawn from at random, cropped around their characters.

    Attributes:
        video: uint8 [N, 3, F, H, W].
        mask: uint8 [N, F, H, W], 255 on the visible body.
        centers: fp32 [N, F, 2], pixels (x, y).
        refresh_s: seconds spent in rendering, for the log.
    """

    def __init__(
        self,
        capacity: int,
        *,
        domains: Sequence[Domain],
        frames: int,
        size: int,
        device: torch.device,
        seed: int,
        chunk: int = 256,
    ) -> None:
        """Renders `capacity` clips, in turn from each domain, `chunk` at a time."""
        self._domains, self._frames, self._size, self._seed = tuple(domains), frames, size, seed
        self._chunk, self._chunks = min(chunk, capacity), 0
        self._generator = torch.Generator(device).manual_seed(keyed_seed(seed, "draw"))
        self.refresh_s = 0.0
        self.video = torch.empty(capacity, 3, frames, size, size, dtype=torch.uint8, device=device)
        self.mask = torch.empty(capacity, frames, size, size, dtype=torch.uint8, device=device)
        self.centers = torch.empty(capacity, frames, 2, device=device)
        for _ in range(-(-capacity // self._chunk)):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Replaces the oldest chunk by newly rendered clips."""
        started = time.monotonic()
        domain = self._domains[self._chunks % len(self._domains)]
        generator = keyed_generator(self._seed, "clips", self._chunks)
        scenes = sample_scenes(
            self._chunk, domain=domain, split=SPLITS[domain], generator=generator, frames=self._frames
        )
        clips = render(scenes, size=self._size, device=self.video.device)
        rows = (torch.arange(self._chunk) + self._chunks * self._chunk) % self.video.shape[0]
        rows = rows.to(self.video.device)
        self.video[rows] = ((clips.video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        self.mask[rows] = (clips.mask.clamp(0, 1) * 255).round().to(torch.uint8)
        self.centers[rows] = clips.centers.to(self.centers)
        if self.video.is_cuda:
            torch.cuda.synchronize(self.video.device)
        self._chunks += 1
        self.refresh_s += time.monotonic() - started

    def draw(self, count: int, crop: int | None = None) -> tuple[Tensor, Tensor]:
        """Draws clips.

        Args:
            count: how many.
            crop: side of a square window, the same in all frames of a clip, that holds the character's place in
                some frame: most of a frame is calm background, which teaches little. None for whole frames.

        Returns:
            Video [B, 3, F, h, w] in [-1, 1] and mask [B, 1, F, h, w] in [0, 1], fp32.
        """
        device = self.video.device
        rows = torch.randint(self.video.shape[0], (count,), generator=self._generator, device=device)
        if crop is None or crop >= self._size:
            video, mask = self.video[rows], self.mask[rows]
        else:
            video, mask = self._cropped(rows, crop)
        return video.float() / 127.5 - 1, mask[:, None].float() / 255

    def _cropped(self, rows: Tensor, crop: int) -> tuple[Tensor, Tensor]:
        device, count = self.video.device, len(rows)
        frame = torch.randint(self._frames, (count,), generator=self._generator, device=device)
        jitter = torch.rand(count, 2, generator=self._generator, device=device) - 0.5
        middle = self.centers[rows, frame] + jitter * crop / 2
        corner = (middle - crop / 2).round().long().clamp(0, self._size - crop)
        offsets = torch.arange(crop, device=device)
        x = (corner[:, :1] + offsets)[:, None, None, None, :]
        y = (corner[:, 1:] + offsets)[:, None, None, :, None]
        row = rows[:, None, None, None, None]
        channel = torch.arange(3, device=device)[None, :, None, None, None]
        time_index = torch.arange(self._frames, device=device)[None, None, :, None, None]
        video = self.video[row, channel, time_index, y, x]
        mask = self.mask[row[:, 0], time_index[:, 0], y[:, 0], x[:, 0]]
        return video, mask
