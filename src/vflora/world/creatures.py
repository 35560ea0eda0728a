"""The creatures: mirrored bitmaps that melted into soft bodies, with eyes, ears, paws and wings."""

from __future__ import annotations

import random
from typing import TypeAlias

from torch import Tensor

from vflora.world.characters import Traits
from vflora.world.drawing import Canvas, mix, union
from vflora.world.parts import paint_eyes, paint_mouth, paint_outlined, paint_pattern, swing

_Cell: TypeAlias = tuple[int, int]
_FACE: frozenset[_Cell] = frozenset({(0, 2), (0, 3), (1, 2), (1, 3)})
_CELL = 0.21


def draw_creature(canvas: Canvas, traits: Traits) -> None:
    """Draws a creature in both limb phases."""
    rng = traits.rng
    cells = _grow_bitmap(rng)
    places = {(c, r): (c * _CELL, (r - 3) * _CELL) for c, r in cells}
    discs = [(side * x, y, 0.74 * _CELL) for x, y in places.values() for side in ((1,) if x == 0 else (-1, 1))]
    body = canvas.blob(discs, 0.15 * _CELL)
    top, bottom = min(r for _, r in cells), max(r for _, r in cells)
    _paint_limbs(canvas, traits, places, bottom)
    _paint_topper(canvas, traits, (top - 3.4) * _CELL)
    paint_outlined(canvas, body, traits.main, traits.ink)
    spots = [(max(x, 0.09), y, 0.5 * _CELL) for cell, (x, y) in places.items() if cell not in _FACE]
    belly, band = (max(bottom - 0.6, 4.0) - 3) * _CELL, (_row_for_band(cells) - 3) * _CELL
    paint_pattern(canvas, body, traits, belly=belly, band=band, spots=spots)
    _paint_face(canvas, traits, -0.5 * _CELL)


def _grow_bitmap(rng: random.Random) -> list[_Cell]:
    """Returns the filled cells (column, row) of the right half, columns counted from the mirror axis outwards.

    The bitmap grows cell by cell from a face in its middle, so that it is always one piece.
    """
    cells = {*_FACE, (0, 4)}
    widest, tallest = rng.choice((2, 2, 2, 3)), rng.choice((5, 5, 6))
    for _ in range(rng.randint(3, 7)):
        beside = {(c + dc, r + dr) for c, r in cells for dc, dr in ((1, 0), (-1, 0), (0, 1), (0, -1))}
        edge = sorted((c, r) for c, r in beside - cells if 0 <= c <= widest and 0 <= r <= tallest)
        cells.add(rng.choice(edge))
    # a hole of one cell would melt into a stray dot
    around = {(c, r): {(abs(c - 1), r), (c + 1, r), (c, r - 1), (c, r + 1)} for c in range(4) for r in range(7)}
    return sorted(cells | {cell for cell, beside in around.items() if beside <= cells})


def _row_for_band(cells: list[_Cell]) -> float:
    """Returns the widest row that eyes and mouth leave free, the lower one of two; or else the row of the eyes."""
    width = {row: max(c for c, r in cells if r == row) for _, row in cells}
    free = [row for row in width if row not in (2, 3) and width[row] > 0]
    return max(free, key=lambda row: (width[row], row)) if free else 2.8


def _paint_limbs(canvas: Canvas, traits: Traits, places: dict[_Cell, tuple[float, float]], bottom: int) -> None:
    rng, step = traits.rng, swing()
    thick = rng.uniform(0.1, 0.14)
    lowest = {c: max(r for c2, r in places if c2 == c) for c, _ in places}
    stance = rng.choice(sorted(c for c, r in lowest.items() if r >= bottom - 1))
    x, y = places[stance, lowest[stance]]
    x, foot = max(x, 0.17), (bottom - 3) * _CELL + rng.uniform(0.3, 0.38)
    limbs: list[Tensor] = [
        canvas.stroke(side * x, y, side * (x + 0.02) + 0.05 * step, foot - 0.11 * side * step, thick)
        for side in (-1, 1)
    ]
    arms = rng.choice(("paws", "paws", "wings", "fins", "none"))
    x, y = places[max(cell for cell in places if cell[1] in (2, 3, 4))]
    out = x + _CELL * 0.7 + 0.2
    for side in (-1, 1):
        if arms == "paws":  # one up, one down, as in walking
            limbs.append(canvas.stroke(side * x, y, side * out, y - 0.22 * side * step, thick * 0.95))
        elif arms == "wings":  # both up, both down
            tip = y - 0.24 * step
            limbs.append(canvas.stroke(side * x, y, side * (out - 0.1), tip, 0.1))
            limbs.append(canvas.ellipse(side * (out - 0.06), tip + 0.06, 0.14, 0.2))
        elif arms == "fins":
            tip = y + 0.02 - 0.2 * step
            corners = [(side * x, y - 0.16), (side * x, y + 0.16)]
            limbs += [canvas.stroke(*corner, side * out, tip, 0.06) for corner in corners]
            limbs.append(canvas.stroke(side * x, y, side * out, tip, 0.1))
    paint_outlined(canvas, union(*limbs), mix(traits.accent, traits.main, 0.12), traits.ink)


def _paint_topper(canvas: Canvas, traits: Traits, high: float) -> None:
    """Paints ears, horns and the like on a head whose top is at `high`."""
    rng = traits.rng
    kind = rng.choice(("ears", "points", "horns", "antennae", "crest", "horn", "leaf", "none"))
    base, tip = high + 1.2 * _CELL, high - rng.uniform(0.16, 0.28)
    x = _CELL * rng.uniform(0.75, 1.15)
    match kind:
        case "ears":
            parts = [canvas.ellipse(s * x, (tip + base) / 2, 0.15, (base - tip) / 2) for s in (-1, 1)]
        case "points":
            parts = [
                canvas.polygon([(s * (x - 0.18), base), (s * (x + 0.18), base), (s * (x + 0.14), tip)], 0.04)
                for s in (-1, 1)
            ]
        case "horns":
            parts = [canvas.stroke(s * x * 0.7, base, s * (x * 0.7 + 0.22), tip, 0.085) for s in (-1, 1)]
        case "antennae":
            parts = [canvas.stroke(s * 0.1, base, s * x, tip, 0.04) for s in (-1, 1)]
            parts += [canvas.disc(s * x, tip, 0.115) for s in (-1, 1)]
        case "crest":
            parts = [
                canvas.polygon([(k * 0.2 - 0.13, base), (k * 0.2 + 0.13, base), (k * 0.26, tip + 0.08 * abs(k))], 0.03)
                for k in (-1, 0, 1)
            ]
        case "horn":
            parts = [canvas.polygon([(-0.15, base), (0.15, base), (0.0, tip - 0.04)], 0.04)]
        case "leaf":
            parts = [canvas.stroke(0.0, base, 0.0, tip, 0.05)]
            parts += [canvas.ellipse(s * 0.17, tip + 0.02, 0.17, 0.1) for s in (-1, 1)]
        case _:
            return
    paint_outlined(canvas, union(*parts), traits.accent, traits.ink)


def _paint_face(canvas: Canvas, traits: Traits, y: float) -> None:
    rng = traits.rng
    eyes, radius = rng.choice((1, 2, 2, 2, 2, 3)), rng.uniform(0.15, 0.185)
    gap = radius * 1.14
    places = {
        1: [(0.0, y)],
        2: [(-gap, y), (gap, y)],
        3: [(-gap * 1.2, y + 0.03), (gap * 1.2, y + 0.03), (0.0, y - radius * 1.1)],
    }[eyes]
    radius *= {1: 1.45, 2: 1.0, 3: 0.85}[eyes]
    paint_eyes(canvas, traits, places, radius, look=rng.choice((-0.2, 0.0, 0.2)))
    kind = rng.choice(("smile", "fang", "beak", "dot"))
    paint_mouth(canvas, traits, kind, y + radius + 0.13, 0.15)
