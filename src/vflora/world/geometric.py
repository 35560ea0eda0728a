"""The geometric characters: twelve shapes with stick arms and legs."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from vflora.world.characters import Traits
from vflora.world.drawing import Canvas, mix, union
from vflora.world.parts import paint_eyes, paint_mouth, paint_outlined, paint_pattern, swing

_SPOTS = (
    (0.22, 0.36, 0.12), (0.42, 0.12, 0.12), (0.16, -0.42, 0.11),
    (0.4, -0.3, 0.1), (0.5, 0.38, 0.1),
)  # fmt: skip


def draw_geometric(canvas: Canvas, traits: Traits) -> None:
    """Draws a geometric character in both limb phases; see `Traits.bent`."""
    dice = traits.rng.uniform
    frame = canvas
    if traits.bent:
        frame = canvas.bent(dice(0.7, 1.25), dice(0.7, 1.2), dice(0.0, 0.4), dice(0.5, 2.5), dice(0.0, math.tau))
    body = _body(frame, traits.body)
    step = swing()
    limbs = []
    for side in (-1, 1):
        foot = (side * 0.26 + 0.05 * step, 0.8 - 0.1 * side * step)
        limbs.append(canvas.stroke(side * 0.22, 0.35, *foot, 0.09))
        limbs.append(canvas.stroke(side * 0.35, 0.1, side * 0.8, 0.08 - 0.25 * side * step, 0.085))
    paint_outlined(canvas, union(*limbs), mix(traits.accent, traits.ink, 0.15), traits.ink)
    paint_outlined(canvas, body, traits.main, traits.ink)
    paint_pattern(canvas, body, traits, belly=0.26, band=0.26, spots=_SPOTS)
    if traits.bent:
        apart, high, radius = dice(0.13, 0.22), dice(-0.22, 0.0), dice(0.1, 0.19)
        paint_eyes(canvas, traits, [(-apart, high), (apart, high)], radius, look=traits.rng.choice((-0.2, 0.0, 0.2)))
        paint_mouth(canvas, traits, traits.rng.choice(("smile", "fang", "beak", "round")), high + 0.26, 0.14)
        return
    paint_eyes(canvas, traits, [(-0.21, -0.1), (0.21, -0.1)], 0.175, look=0.0)
    paint_mouth(canvas, traits, "smile", 0.16, 0.14)


def _body(canvas: Canvas, shape: str) -> Tensor:
    """Returns the distance to a shape about as large as a disc of radius 0.6."""
    match shape:
        case "circle":
            return canvas.disc(0.0, 0.0, 0.6)
        case "square":
            return canvas.polygon(_ring(4, 0.68, 1 / 8), 0.06)
        case "triangle":
            return canvas.polygon([(x, y + 0.08) for x, y in _ring(3, 0.72)], 0.08)
        case "star":
            tips = zip(_ring(5, 0.72), _ring(5, 0.42, 1 / 10), strict=True)
            return canvas.polygon([corner for pair in tips for corner in pair], 0.05)
        case "diamond":
            return canvas.polygon([(0.0, -0.7), (0.58, 0.0), (0.0, 0.7), (-0.58, 0.0)], 0.06)
        case "hexagon":
            return canvas.polygon(_ring(6, 0.62, 1 / 12), 0.03)
        case "heart":
            return canvas.polygon(_heart(), 0.03)
        case "flower":
            return canvas.polygon(_curve(lambda turn: 0.55 + 0.11 * math.cos(6 * turn)), 0.02)
        case "cross":
            return _min_of_boxes(canvas)
        case "house":
            corners = [(0.0, -0.68), (0.5, -0.2), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.2)]
            return canvas.polygon(corners, 0.06)
        case "drop":
            return canvas.polygon(_curve(lambda turn: 0.52 + 0.27 * max(0.0, math.cos(turn)) ** 9), 0.03)
        case _:  # cloud
            puffs = [(-0.38, 0.16, 0.28), (0.38, 0.16, 0.28), (-0.22, -0.22, 0.32), (0.24, -0.18, 0.34), (0, 0.2, 0.33)]
            return canvas.blob(puffs, 0.03)


def _min_of_boxes(canvas: Canvas) -> Tensor:
    wide, narrow = 0.56, 0.27
    upright = canvas.polygon([(-narrow, -wide), (narrow, -wide), (narrow, wide), (-narrow, wide)], 0.06)
    level = canvas.polygon([(-wide, -narrow), (wide, -narrow), (wide, narrow), (-wide, narrow)], 0.06)
    return union(upright, level)


def _ring(corners: int, radius: float, start: float = 0.0) -> list[tuple[float, float]]:
    turns = [math.tau * (start + k / corners) for k in range(corners)]
    return [(radius * math.sin(turn), -radius * math.cos(turn)) for turn in turns]


def _curve(radius_of: Callable[[float], float], corners: int = 60) -> list[tuple[float, float]]:
    turns = [math.tau * k / corners for k in range(corners)]
    return [(radius_of(turn) * math.sin(turn), -radius_of(turn) * math.cos(turn)) for turn in turns]


def _heart(corners: int = 60) -> list[tuple[float, float]]:
    turns = [math.tau * k / corners for k in range(corners)]
    return [
        (
            0.64 * math.sin(turn) ** 3,
            -0.04 * (13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)),
        )
        for turn in turns
    ]
