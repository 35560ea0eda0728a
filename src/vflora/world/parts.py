"""Parts that all characters share: outlined shapes, patterns, eyes, mouths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vflora.world.characters import Traits
from vflora.world.drawing import Canvas, Colour, union

OUTLINE = 0.07
_WHITE: Colour = (0.99, 0.98, 0.96)
_BEAK: Colour = (0.98, 0.72, 0.25)


def swing() -> Tensor:
    """Returns -1 for the first limb phase and 1 for the second, [2, 1, 1]."""
    return torch.tensor([-1.0, 1.0]).view(2, 1, 1)


def paint_outlined(canvas: Canvas, distance: Tensor, colour: Colour, ink: Colour) -> None:
    """Paints a shape with a bold dark line around it."""
    canvas.paint(distance - OUTLINE, ink)
    canvas.paint(distance, colour)


def paint_pattern(
    canvas: Canvas,
    body: Tensor,
    traits: Traits,
    *,
    belly: float,
    band: float,
    spots: Sequence[tuple[float, float, float]],
) -> None:
    """Paints the character's pattern on its body.

    Args:
        canvas: where to paint.
        body: distance to the body.
        traits: the character; its pattern decides what is painted.
        belly: height of the belly's middle.
        band: height of a band's middle.
        spots: places (x, y, radius) where spots may sit; they are mirrored.
    """
    rng = traits.rng
    match traits.pattern:
        case "plain":
            canvas.paint(canvas.ellipse(0.0, belly, 0.28, 0.22), traits.pale, within=body + 0.03)
        case "striped":
            step, half_width, first = rng.uniform(0.29, 0.34), rng.uniform(0.065, 0.08), rng.uniform(-0.1, 0.1)
            stripes = [canvas.stripe(first + k * step, half_width) for k in range(-3, 4)]
            canvas.paint(union(*stripes), traits.accent, within=body)
        case "spotted":
            chosen = rng.sample(list(spots), min(len(spots), 3))
            discs = [canvas.disc(side * x, y, radius) for x, y, radius in chosen for side in (-1, 1)]
            canvas.paint(union(*discs), traits.accent, within=body)
        case _:  # banded
            canvas.paint(canvas.stripe(band, 0.13), traits.accent, within=body)


def paint_eyes(
    canvas: Canvas, traits: Traits, places: Sequence[tuple[float, float]], radius: float, *, look: float
) -> None:
    """Paints eyes; `look` moves the pupils sideways, as a share of the radius."""
    for x, y in places:
        canvas.paint(canvas.disc(x, y, radius + 0.035), traits.ink)
        canvas.paint(canvas.disc(x, y, radius), _WHITE)
    for x, y in places:
        canvas.paint(canvas.disc(x + look * radius, y + 0.08 * radius, radius * 0.58), traits.ink)
        canvas.paint(canvas.disc(x + (look - 0.2) * radius, y - 0.18 * radius, radius * 0.18), _WHITE)


def paint_mouth(canvas: Canvas, traits: Traits, kind: str, y: float, width: float) -> None:
    """Paints a smile, a mouth with fangs, a beak or a small round mouth."""
    match kind:
        case "smile":
            canvas.paint(torch.maximum(canvas.disc(0.0, y - 0.3 * width, width), y - canvas.y), traits.ink)
        case "fang":
            canvas.paint(canvas.stroke(-width, y, width, y, 0.035), traits.ink)
            for side in (-0.55 * width, 0.55 * width):
                corners = [(side - 0.05, y + 0.02), (side + 0.05, y + 0.02), (side, y + 0.13)]
                canvas.paint(canvas.polygon(corners, 0.01), _WHITE)
        case "beak":
            corners = [(-0.8 * width, y - 0.06), (0.8 * width, y - 0.06), (0.0, y + 0.9 * width)]
            paint_outlined(canvas, canvas.polygon(corners, 0.02) + 0.01, _BEAK, traits.ink)
        case _:
            canvas.paint(canvas.disc(0.0, y, 0.45 * width), traits.ink)
