"""Curves over the steps of a run as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from vflora.report.axes import BOTTOM, HEIGHT, LEFT, Frame, padded, spread, svg, ticks

Series = Sequence[tuple[int, float]]
_MOST_POINTS = 240
_FADE = 0.1
"""Share of the curve that the smoothed line looks back on, as an exponential mean."""


def curves(
    lines: Mapping[str, Series], description: str, *, rule: float | None = None, zone_below: float | None = None
):
    """Draws metrics over the steps.

    Long ones are drawn twice: faintly as they are, and smoothed.

    Args:
        lines: label -> (step, value); those without a value are left out.
        description: for who cannot see the plot.
        rule: height of a dashed line.
        zone_below: shade what is below this.

    Returns:
        SVG; None where no line has a value.
    """
    lines = {name: _thinned(line) for name, line in lines.items() if line}
    if not lines:
        return None
    steps = [step for line in lines.values() for step, _ in line]
    values = [value for line in lines.values() for _, value in line] + [v for v in (rule, zone_below) if v is not None]
    room = 0.05 * max(abs(v) for v in values) or 1e-9
    low, high = padded(values, room)
    frame = Frame((min(steps), max(max(steps), min(steps) + 1)), (max(low, 0.0) if min(values) >= 0 else low, high))
    parts = [*_background(frame, rule, zone_below), *frame.grid(number)]
    parts += [frame.x_label(tick, f"{tick:g}") for tick in ticks(*frame.across, 4) if float(tick).is_integer()]
    parts.append(frame.x_title("step"))
    ends = []
    alone = 1 if len(lines) == 1 else 0
    for index, line in enumerate(lines.values(), start=alone):
        soft = _smoothed(line)
        if len(line) == 1:
            (step, value) = line[0]
            parts.append(f'<circle class="spot s{index}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="4.5"/>')
        if soft != line:
            parts.append(f'<polyline class="line raw s{index}" points="{_points(frame, line)}"/>')
        parts.append(f'<polyline class="line s{index}" points="{_points(frame, soft)}"/>')
        ends.append(frame.y(soft[-1][1]))
    if len(lines) > 1:
        for index, (name, height) in enumerate(zip(lines, spread(ends), strict=True)):
            x, y = frame.x(max(steps)) + 7, height + 4
            parts.append(f'<text class="tag s{index}" x="{x:.1f}" y="{y:.1f}">{name}</text>')
    return svg(parts, description)


def number(value: float) -> str:
    """Returns a short number with a real minus."""
    return f"{value:.4g}".replace("-", "−")


def _background(frame: Frame, rule: float | None, zone_below: float | None) -> list[str]:
    parts = []
    if zone_below is not None:
        top = frame.y(zone_below)
        parts.append(
            f'<rect class="zone" x="{LEFT}" y="{top:.1f}" width="{frame.right - LEFT}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"/>'
        )
    if rule is not None:
        y = f"{frame.y(rule):.1f}"
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{frame.right}" y1="{y}" y2="{y}"/>')
    return parts


def _thinned(line: Series) -> list[tuple[int, float]]:
    """Joins neighbours by their mean until few enough are left to draw; the newest step stays the last."""
    size = -(-len(line) // _MOST_POINTS)
    groups = [line[max(0, end - size) : end] for end in range(len(line), 0, -size)][::-1]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def _smoothed(line: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential mean whose start is not pulled towards the first value; short lines stay as they are."""
    if len(line) < 20:
        return line
    keep = 1 - 1 / max(2.0, _FADE * len(line))
    total = weight = 0.0
    result = []
    for step, value in line:
        total, weight = keep * total + value, keep * weight + 1
        result.append((step, total / weight))
    return result


def _points(frame: Frame, line: Series) -> str:
    return " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in line)
