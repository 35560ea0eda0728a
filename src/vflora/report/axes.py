"""Axes, ticks and labels of small plots as SVG text; a stylesheet paints their classes, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 52, 16, 40
_LABEL_GAP = 17


class Frame:
    """The plotting area: data to pixels, grid lines and labels."""

    def __init__(self, across: tuple[float, float], up: tuple[float, float]):
        """Takes the range of the data to the right and upwards."""
        self.across, self.up = across, up
        self.right, self.bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        """Returns how far right `value` is, in pixels."""
        low, high = self.across
        return LEFT + (value - low) / (high - low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        """Returns how far down `value` is, in pixels."""
        low, high = self.up
        return self.bottom - (value - low) / (high - low) * (self.bottom - TOP)

    def grid(self, name: Callable[[float], str]) -> Iterable[str]:
        """Yields horizontal lines at round numbers, labelled by `name`."""
        for tick in ticks(*self.up, 4):
            y = f"{self.y(tick):.1f}"
            yield f'<line class="grid" x1="{LEFT}" x2="{self.right}" y1="{y}" y2="{y}"/>'
            yield f'<text class="axis" x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{name(tick)}</text>'

    def x_label(self, value: float, text: str) -> str:
        """Returns a label below the axis."""
        return f'<text class="axis" x="{self.x(value):.1f}" y="{self.bottom + 18}" text-anchor="middle">{text}</text>'

    def x_title(self, text: str) -> str:
        """Returns what the axis is, below its labels."""
        middle = (LEFT + self.right) / 2
        return f'<text class="hint" x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{text}</text>'


def svg(parts: Iterable[str], description: str) -> str:
    """Puts a plot together; `description` is for who cannot see it."""
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{body}</svg>'


def padded(values: Iterable[float], least: float = 0.01) -> tuple[float, float]:
    """Returns a range wider than the values by 8 % on both sides, or by `least` if that is more; it is never empty."""
    values = list(values)
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), least)
    return low - room, high + room


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Returns round numbers inside the range, about as many as wanted."""
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(heights: Sequence[float]) -> list[float]:
    """Moves labels apart, keeping their order, so that none covers another."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + _LABEL_GAP)
    overhang = placed[-1] - max(heights[order[-1]], HEIGHT - BOTTOM)
    if overhang > 0:
        placed[-1] -= overhang
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - _LABEL_GAP)
    result = [0.0] * len(heights)
    for i, value in zip(order, placed, strict=True):
        result[i] = value
    return result
