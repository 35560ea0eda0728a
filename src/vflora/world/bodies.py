"""Draws a character so that it just fills the unit circle around its own centroid."""

from __future__ import annotations

import torch
from torch import Tensor

from vflora.world.characters import Domain, traits_of
from vflora.world.creatures import draw_creature
from vflora.world.drawing import Canvas
from vflora.world.geometric import draw_geometric

_DRAFT_SIZE = 40
_DRAFT_ZOOM = 1.6
_FILL = 0.98


def draw_character(character: int, *, domain: Domain, size: int = 64) -> Tensor:
    """Draws both limb phases of a character.

    Args:
        character: its number within the domain.
        domain: geometric characters or creatures.
        size: side of the drawing in pixels.

    Returns:
        Premultiplied RGBA in [0, 1], [2, 4, size, size]; everything lies within the unit circle, and the
        centroid of both phases together in its middle.

    Raises:
        UserError: if the domain has no such character.
    """
    draft = Canvas(_DRAFT_SIZE, zoom=_DRAFT_ZOOM)
    _draw(draft, character, domain)
    alpha = draft.rgba[:, 3]
    x, y = (alpha.mean(0) * draft.x[0]).sum(), (alpha.mean(0) * draft.y[0]).sum()
    weight = alpha.mean(0).sum()
    middle = (float(x / weight), float(y / weight))
    away = torch.hypot(draft.x - middle[0], draft.y - middle[1])[0]
    reach = float(away[alpha.amax(0) > 0.05].max()) + _DRAFT_ZOOM / _DRAFT_SIZE
    canvas = Canvas(size, middle=middle, zoom=reach / _FILL)
    _draw(canvas, character, domain)
    return canvas.rgba


def _draw(canvas: Canvas, character: int, domain: Domain) -> None:
    traits = traits_of(character, domain=domain)
    (draw_geometric if domain == "geometric" else draw_creature)(canvas, traits)
