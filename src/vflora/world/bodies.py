"""Draws characters: a still body with a face, and limbs in two phases."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from vflora.world.characters import Domain, Traits, traits_of
from vflora.world.drawing import Canvas, Colour, mix, union

OUTLINE = 0.075
WHITE: Colour = (0.99, 0.98, 0.96)


def draw_character(character: int, *, domain: Domain, size: int = 64) -> Tensor:
    """Draws both limb phases of a character.

    Returns:
        Premultiplied RGBA in [0, 1], [2, 4, size, size]; everything lies within the unit circle.
    """
    traits = traits_of(character, domain=domain)
    canvas = Canvas(size)
    if domain == "geometric":
        _draw_geometric(canvas, traits)
    else:
        _draw_creature(canvas, traits)
    return canvas.rgba


# ---------------------------------------------------------------- geometric characters


def _draw_geometric(canvas: Canvas, traits: Traits) -> None:
    corners, rounding = _outline(traits.body)
    body = canvas.polygon(corners, rounding)
    swing = _swing()
    limbs = []
    for side in (-1, 1):
        limbs.append(canvas.stroke(side * 0.2, 0.4, side * (0.24 + 0.04 * side * swing), 0.8 - 0.1 * side * swing, 0.085))
        limbs.append(canvas.stroke(side * 0.4, 0.05, side * 0.85, 0.05 - 0.26 * side * swing, 0.075))
    _paint_outlined(canvas, union(*limbs), mix(traits.accent, traits.ink, 0.15), traits.ink)
    _paint_outlined(canvas, body, traits.main, traits.ink)
    _paint_pattern(canvas, body, traits, centre=0.0, reach=0.6)
    spread, radius = 0.2, 0.165
    _paint_eyes(canvas, traits, [(-spread, -0.1), (spread, -0.1)], radius, look=0.0)
    _paint_mouth(canvas, traits, "smile", 0.0, 0.17)


def _outline(shape: str) -> tuple[list[tuple[float, float]], float]:
    """Returns the corners of a shape about as large as a disc of radius 0.6, and their rounding."""
    turn = math.tau

    def ring(corners: int, radius: float, start: float) -> list[tuple[float, float]]:
        angles = [start + turn * k / corners for k in range(corners)]
        return [(radius * math.sin(a), -radius * math.cos(a)) for a in angles]

    def curve(radius_of: object, points: int = 72) -> list[tuple[float, float]]:
        angles = [turn * k / points for k in range(points)]
        return [(radius_of(a) * math.sin(a), -radius_of(a) * math.cos(a)) for a in angles]  # type: ignore[operator]

    match shape:
        case "circle":
            return ring(48, 0.56, 0.0), 0.03
        case "square":
            return ring(4, 0.66, turn / 8), 0.06
        case "triangle":
            return [(x, y + 0.1) for x, y in ring(3, 0.68, 0.0)], 0.07
        case "star":
            outer, inner = ring(5, 0.66, 0.0), ring(5, 0.38, turn / 10)
            return [p for pair in zip(outer, inner, strict=True) for p in pair], 0.05
        case "diamond":
            return [(0.0, -0.68), (0.54, 0.0), (0.0, 0.68), (-0.54, 0.0)], 0.05
        case "hexagon":
            return ring(6, 0.6, turn / 12), 0.03
        case "heart":
            angles = [turn * k / 72 for k in range(72)]
            return [
                (
                    0.038 * 16 * math.sin(a) ** 3,
                    -0.038 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)),
                )
                for a in angles
            ], 0.03
        case "flower":
            return curve(lambda a: 0.52 + 0.12 * math.cos(6 * a)), 0.02
        case "cross":
            w, r = 0.26, 0.58
            return [(-w, -r), (w, -r), (w, -w), (r, -w), (r, w), (w, w), (w, r), (-w, r), (-w, w), (-r, w), (-r, -w), (-w, -w)], 0.06  # fmt: skip
        case "moon":
            outer = [(0.62 * math.cos(a), 0.62 * math.sin(a)) for a in (math.pi * (0.15 + 1.05 * k / 36 - 0.1) for k in range(37))]
            inner = [(0.62 * math.cos(math.pi * 0.05) - 0.0, 0.0)]
            return outer + inner[:0], 0.05
        case "drop":
            return curve(lambda a: 0.5 + 0.24 * max(0.0, math.cos(a)) ** 6), 0.02
        case _:  # cloud
            return curve(lambda a: 0.5 + 0.1 * abs(math.cos(2.5 * a)) + 0.1 * abs(math.sin(a)) * (math.cos(a) < 0.6)), 0.02


# ---------------------------------------------------------------- creatures


def _draw_creature(canvas: Canvas, traits: Traits) -> None:
    rng = traits.rng
    cells = _grow_bitmap(rng)
    widest = max(column for column, _ in cells)
    rows = [row for _, row in cells]
    top, bottom = min(rows), max(rows)
    cell = min(0.62 / (widest + 0.7), 1.08 / (bottom - top + 1.4))
    middle = (top + bottom) / 2 + 0.1
    place = {(c, r): (c * cell, (r - middle) * cell) for c, r in cells}
    discs = [(s * x, y, 0.72 * cell) for x, y in place.values() for s in ((1,) if x == 0 else (-1, 1))]
    body = canvas.blob(discs, 0.16 * cell)
    face_y = (2.55 - middle) * cell
    low = (bottom + 0.5 - middle) * cell
    high = (top - 0.45 - middle) * cell

    _paint_limbs(canvas, traits, low, place, cell)
    _paint_topper(canvas, traits, high, cell)
    _paint_outlined(canvas, body, traits.main, traits.ink)
    _paint_pattern(canvas, body, traits, centre=(3.6 - middle) * cell, reach=0.75)
    eyes = rng.choice((1, 2, 2, 2, 2, 3))
    radius = cell * rng.uniform(0.62, 0.82)
    gap = radius * 1.12
    spots = {
        1: [(0.0, face_y)],
        2: [(-gap, face_y), (gap, face_y)],
        3: [(-gap * 1.15, face_y + 0.1 * cell), (gap * 1.15, face_y + 0.1 * cell), (0.0, face_y - radius * 1.15)],
    }[eyes]
    size = {1: 1.3, 2: 1.0, 3: 0.82}[eyes]
    _paint_eyes(canvas, traits, spots, radius * size, look=rng.choice((-0.2, 0.0, 0.2)))
    _paint_mouth(canvas, traits, rng.choice(("smile", "fang", "beak", "dot")), 0.0, face_y + radius * 1.55)


def _grow_bitmap(rng: random.Random) -> list[tuple[int, int]]:
    """Returns the filled cells (column, row) of the right half, columns from the mirror axis outwards.

    The bitmap grows cell by cell from a face in its middle, so that it is always one piece.
    """
    cells = {(0, 2), (0, 3), (0, 4), (1, 2), (1, 3)}
    for _ in range(rng.randint(3, 9)):
        edge = {
            (c + dc, r + dr)
            for c, r in cells
            for dc, dr in ((1, 0), (-1, 0), (0, 1), (0, -1))
            if 0 <= c + dc <= 3 and 0 <= r + dr <= 6
        } - cells
        cells.add(rng.choice(sorted(edge)))
    return sorted(cells)


def _paint_limbs(
    canvas: Canvas, traits: Traits, low: float, place: dict[tuple[int, int], tuple[float, float]], cell: float
) -> None:
    rng, swing = traits.rng, _swing()
    thick = rng.uniform(0.085, 0.13)
    limbs: list[Tensor] = []
    leg_columns = {(c, max(r for c2, r in place if c2 == c)) for c, _ in place}
    stance = rng.choice(sorted(column for column in leg_columns if column[0] <= 2 and column[0] >= 1))
    x, y = place[stance]
    foot = min(0.9, max(low, y) + rng.uniform(0.2, 0.3))
    for side in (-1, 1):
        limbs.append(canvas.stroke(side * x, y, side * (x + 0.03) + 0.05 * swing, foot - 0.11 * side * swing, thick))
    arm = rng.choice(("paw", "paw", "wing", "none"))
    if arm != "none":
        shoulder = max((c, r) for c, r in place if r in (2, 3, 4))
        x, y = place[shoulder]
        out = min(x + cell * 0.7 + 0.24, 0.88)
        for side in (-1, 1):
            lift = 0.24 * (swing if arm == "wing" else side * swing) - 0.02
            tip_y = y - lift
            limbs.append(canvas.stroke(side * x, y, side * out, tip_y, thick * 0.9))
            if arm == "wing":
                limbs.append(canvas.ellipse(side * (out - 0.06), tip_y + 0.08, 0.12, 0.17))
    _paint_outlined(canvas, union(*limbs), mix(traits.accent, traits.main, 0.15), traits.ink)


def _paint_topper(canvas: Canvas, traits: Traits, high: float, cell: float) -> None:
    rng = traits.rng
    kind = rng.choice(("ears", "points", "horns", "antennae", "crest", "horn", "leaf", "none"))
    base = high + cell
    tip = max(-0.88, high - rng.uniform(0.14, 0.28))
    x = cell * rng.uniform(0.7, 1.2)
    parts: list[Tensor] = []
    match kind:
        case "ears":
            parts = [canvas.ellipse(s * x, (tip + base) / 2, 0.14, (base - tip) / 2) for s in (-1, 1)]
        case "points":
            parts = [
                canvas.polygon([(s * (x - 0.17), base), (s * (x + 0.17), base), (s * (x + 0.14), tip)], 0.03)
                for s in (-1, 1)
            ]
        case "horns":
            parts = [canvas.stroke(s * x * 0.8, base, s * (x * 0.8 + 0.2), tip, 0.075) for s in (-1, 1)]
        case "antennae":
            parts = [canvas.stroke(s * 0.1, base, s * x, tip, 0.04) for s in (-1, 1)]
            parts += [canvas.disc(s * x, tip, 0.1) for s in (-1, 1)]
        case "crest":
            parts = [
                canvas.polygon([(k * 0.19 - 0.12, base), (k * 0.19 + 0.12, base), (k * 0.24, tip + 0.07 * abs(k))], 0.02)
                for k in (-1, 0, 1)
            ]
        case "horn":
            parts = [canvas.polygon([(-0.13, base), (0.13, base), (0.0, tip - 0.04)], 0.03)]
        case "leaf":
            parts = [canvas.stroke(0.0, base, 0.0, tip, 0.045)]
            parts += [canvas.ellipse(s * 0.15, tip + 0.02, 0.15, 0.085) for s in (-1, 1)]
        case _:
            return
    _paint_outlined(canvas, union(*parts), traits.accent, traits.ink)


# ---------------------------------------------------------------- parts that all share


def _swing() -> Tensor:
    """Returns -1 in one phase and 1 in the other, [2, 1, 1]."""
    return torch.tensor([-1.0, 1.0]).view(2, 1, 1)


def _paint_outlined(canvas: Canvas, distance: Tensor, colour: Colour, ink: Colour) -> None:
    canvas.paint(distance - OUTLINE, ink)
    canvas.paint(distance, colour)


def _paint_pattern(canvas: Canvas, body: Tensor, traits: Traits, *, centre: float, reach: float) -> None:
    rng = traits.rng
    match traits.pattern:
        case "plain":
            canvas.paint(canvas.ellipse(0.0, centre + 0.12, 0.27, 0.24), traits.pale, within=body + 0.03)
        case "striped":
            step, thick = rng.uniform(0.27, 0.33), rng.uniform(0.055, 0.075)
            start = rng.uniform(-0.08, 0.08)
            for k in range(-3, 4):
                y = start + k * step
                canvas.paint((canvas.y - y).abs() - thick + 0 * canvas.x, traits.accent, within=body)
        case "spotted":
            for _ in range(4):
                x, y = rng.uniform(0.16, reach * 0.8), rng.uniform(-0.55, 0.6)
                radius = rng.uniform(0.085, 0.13)
                spots = union(canvas.disc(-x, y, radius), canvas.disc(x, y, radius))
                canvas.paint(spots, traits.accent, within=body + 0.02)
        case _:  # banded
            y = centre + rng.uniform(0.14, 0.22)
            canvas.paint((canvas.y - y).abs() - 0.13 + 0 * canvas.x, traits.accent, within=body)


def _paint_eyes(
    canvas: Canvas, traits: Traits, places: Sequence[tuple[float, float]], radius: float, *, look: float
) -> None:
    for x, y in places:
        canvas.paint(canvas.disc(x, y, radius + 0.03), traits.ink)
        canvas.paint(canvas.disc(x, y, radius), WHITE)
    for x, y in places:
        canvas.paint(canvas.disc(x + look * radius, y + 0.1 * radius, radius * 0.56), traits.ink)
        canvas.paint(canvas.disc(x + (look - 0.2) * radius, y - 0.15 * radius, radius * 0.17), WHITE)


def _paint_mouth(canvas: Canvas, traits: Traits, kind: str, x: float, y: float) -> None:
    match kind:
        case "smile":
            cut = canvas.disc(x, y - 0.06, 0.14)
            canvas.paint(torch.maximum(cut, y - canvas.y), traits.ink)
        case "fang":
            canvas.paint(canvas.stroke(x - 0.13, y, x + 0.13, y, 0.035), traits.ink)
            for side in (-1, 1):
                fang = [(x + side * 0.08 - 0.04, y + 0.02), (x + side * 0.08 + 0.04, y + 0.02), (x + side * 0.08, y + 0.11)]
                canvas.paint(canvas.polygon(fang, 0.01), WHITE)
        case "beak":
            beak = canvas.polygon([(x - 0.12, y - 0.04), (x + 0.12, y - 0.04), (x, y + 0.12)], 0.02)
            _paint_outlined(canvas, beak, (0.98, 0.72, 0.25), traits.ink)
        case _:
            canvas.paint(canvas.disc(x, y, 0.06), traits.ink)
