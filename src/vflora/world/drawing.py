"""Flat, anti-aliased drawing with signed distances: the pencil that all characters share.

A distance field holds, for every texel, the distance to a shape's edge, negative inside. Coordinates run from
-1 to 1, x to the right and y down. Numbers may be Python floats or tensors that broadcast, such as [2, 1, 1]
for the two limb phases.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from copy import copy
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
Colour: TypeAlias = tuple[float, float, float]


class Canvas:
    """A picture with premultiplied alpha that shapes are painted on, last on top.

    It shows what lies within `zoom` of `middle`, in both directions.

    Attributes:
        x: coordinates of the texel centres [1, 1, S].
        y: likewise [1, S, 1].
        rgba: what was painted so far [P, 4, S, S], for P limb phases.
    """

    def __init__(
        self, size: int, *, phases: int = 2, middle: tuple[float, float] = (0.0, 0.0), zoom: float = 1.0
    ) -> None:
        axis = ((torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1) * zoom
        self.x, self.y = axis.view(1, 1, size) + middle[0], axis.view(1, size, 1) + middle[1]
        self.rgba = torch.zeros(phases, 4, size, size)
        self._texels_per_unit = size / (2 * zoom)

    def bent(self, width: float, height: float, wave: float, turns: float, phase: float) -> Canvas:
        """Returns this canvas with other coordinates: what is measured on it comes out bent and stretched.

        Args:
            width: how much wider shapes become.
            height: how much higher.
            wave: how much the width swings along the height, as a share; left and right stay alike.
            turns: swings from the middle to an end.
            phase: of the swing.
        """
        other = copy(self)
        other.y = self.y / height
        other.x = self.x / (width * (1 + wave * torch.sin(math.pi * turns * other.y + phase)))
        return other

    def cover(self, distance: Tensor) -> Tensor:
        """Returns how much of each texel the shape covers, 0 to 1."""
        return (0.5 - distance * self._texels_per_unit).clamp(0, 1)

    def paint(self, distance: Tensor, colour: Colour, within: Tensor | None = None) -> None:
        """Fills the shape with one colour, only `within` another shape if that is given."""
        self.rgba = self._over(self.rgba, distance, colour, within)

    def _over(self, below: Tensor, distance: Tensor, colour: Colour, within: Tensor | None) -> Tensor:
        cover = self.cover(distance)
        if within is not None:
            cover = cover * self.cover(within)
        cover = cover.expand(below.shape[0], *cover.shape[1:]).unsqueeze(1)
        return below * (1 - cover) + cover * torch.tensor([*colour, 1.0]).view(1, 4, 1, 1)

    def disc(self, x: Number, y: Number, radius: Number) -> Tensor:
        """Distance to a circle."""
        return torch.hypot(self.x - x, self.y - y) - radius

    def ellipse(self, x: Number, y: Number, width: Number, height: Number) -> Tensor:
        """Distance to an ellipse with half axes `width` and `height`, good near its edge."""
        px, py = self.x - x, self.y - y
        level = torch.hypot(px / width, py / height)
        slope = torch.hypot(px / width**2, py / height**2).clamp_min(1e-4)
        return level * (level - 1) / slope

    def stroke(self, x0: Number, y0: Number, x1: Number, y1: Number, radius: Number) -> Tensor:
        """Distance to a line with round ends."""
        dx, dy = x1 - x0, y1 - y0
        px, py = self.x - x0, self.y - y0
        along = (px * dx + py * dy) / (dx * dx + dy * dy + 1e-9)
        along = along.clamp(0, 1)
        return torch.hypot(px - along * dx, py - along * dy) - radius

    def stripe(self, y: float, half_width: float) -> Tensor:
        """Distance to a level stripe from edge to edge."""
        return (self.y - y).abs() - half_width + torch.zeros_like(self.x)

    def polygon(self, corners: Sequence[tuple[float, float]], rounding: float = 0.0) -> Tensor:
        """Distance to a simple polygon whose corners are rounded outwards by `rounding`."""
        here = torch.tensor(corners).T.reshape(2, -1, 1, 1)
        before = here.roll(1, dims=1)
        ex, ey = before - here
        px, py = self.x - here[0], self.y - here[1]
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.hypot(px - along * ex, py - along * ey).amin(0, keepdim=True)
        crosses = (here[1] <= self.y) != (before[1] <= self.y)
        left = (px * ey > py * ex) == (ey > 0)  # the edge passes to the left of the texel
        inside = (crosses & left).sum(0, keepdim=True) % 2 == 1
        return torch.where(inside, -nearest, nearest) - rounding

    def blob(self, discs: Sequence[tuple[float, float, float]], softness: float) -> Tensor:
        """Distance to discs (x, y, radius) that melt into each other over `softness`."""
        x, y, radius = torch.tensor(discs).T.reshape(3, -1, 1, 1)
        distances = torch.hypot(self.x - x, self.y - y) - radius
        return -softness * torch.logsumexp(-distances / softness, dim=0, keepdim=True)


def union(*distances: Tensor) -> Tensor:
    """Distance to all shapes together."""
    joined = distances[0]
    for distance in distances[1:]:
        joined = torch.minimum(joined, distance)
    return joined


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Returns `first` with a `share` of `second` in it."""
    r, g, b = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return r, g, b


def from_hls(hue: float, lightness: float, saturation: float) -> Colour:
    """Returns the colour of a hue in turns (any real number), lightness and saturation in [0, 1]."""
    return colorsys.hls_to_rgb(hue % 1.0, lightness, saturation)
