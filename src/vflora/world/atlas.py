"""Drawn characters, kept on each device so that rendering only has to look them up."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vflora.devices import one_thread
from vflora.errors import UserError
from vflora.world.bodies import draw_character
from vflora.world.characters import Domain, character_count

TEXELS = 64
"""Side of a drawing. A character is about a third of a 64-pixel frame, rendered at twice the resolution."""


class Atlas:
    """Drawings of one domain on one device; each is made when it is first asked for.

    Drawing happens on the CPU whatever the device, so that the pictures are the same everywhere.
    """

    def __init__(self, domain: Domain, device: torch.device) -> None:
        count = character_count(domain)
        self.domain: Domain = domain
        self._rgba = torch.zeros(count, 2, 4, TEXELS, TEXELS, dtype=torch.uint8, device=device)
        self._middle = torch.zeros(count, 2, 2, device=device)
        self._drawn: set[int] = set()

    def look_up(self, characters: Tensor) -> tuple[Tensor, Tensor]:
        """Returns drawings and centroids.

        Args:
            characters: numbers [B].

        Returns:
            Premultiplied RGBA, uint8 [B, 2, 4, TEXELS, TEXELS], and the centroid of each phase's alpha, (x, y)
            [B, 2, 2] in the drawing's coordinates from -1 to 1.

        Raises:
            UserError: if the domain has no such character.
        """
        missing = sorted(set(characters.tolist()) - self._drawn)
        if missing and not 0 <= missing[0] <= missing[-1] < len(self._rgba):
            raise UserError(
                f"{self.domain} has characters 0 to {len(self._rgba) - 1}, not {missing[0]} to {missing[-1]}."
            )
        if missing:
            with one_thread():
                drawings = torch.stack([draw_character(c, domain=self.domain, size=TEXELS) for c in missing])
            rows = torch.tensor(missing, device=self._rgba.device)
            self._rgba[rows] = (drawings * 255).round().to(torch.uint8).to(self._rgba.device)
            self._middle[rows] = _centroids(drawings[:, :, 3]).to(self._rgba.device)
            self._drawn.update(missing)
        index = characters.to(self._rgba.device)
        return self._rgba[index], self._middle[index]


@cache
def atlas_for(domain: Domain, device: torch.device) -> Atlas:
    """Returns the one atlas of this process for a domain and a device."""
    return Atlas(domain, device)


def _centroids(alpha: Tensor) -> Tensor:
    axis = (torch.arange(alpha.shape[-1]) + 0.5) * (2 / alpha.shape[-1]) - 1
    weight = alpha.sum((-2, -1))
    x = (alpha * axis).sum((-2, -1)) / weight
    y = (alpha * axis[:, None]).sum((-2, -1)) / weight
    return torch.stack([x, y], dim=-1)
