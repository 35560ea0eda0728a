"""Three small plots as SVG text. Colours are classes, so that the page's stylesheet paints light and dark."""

from __future__ import annotations

from statistics import mean, median

from vflora.report.axes import LEFT, TOP, Frame, padded, spread, svg, ticks
from vflora.report.records import BASE, KEPT_MOTION, Comparison, scale_name

_MOST_MOTION = 2.5


def identity_plot(comparison: Comparison) -> str:
    """Draws the mean cosine to the reference over the frames, a line for the base and for each scale."""
    lines = {}
    for scale in (BASE, *comparison.scales):
        curves = [clip.scores.identity.cosines for clip in comparison.clips(scale)]
        lines[scale] = [mean(values) for values in zip(*curves, strict=True)]
    frames = len(lines[BASE])
    frame = Frame((0, max(1, frames - 1)), padded(value for line in lines.values() for value in line))
    zone = frames - max(1, frames // 4)
    parts = [
        f'<rect class="zone" x="{frame.x(zone):.1f}" y="{TOP}" width="{frame.right - frame.x(zone):.1f}" '
        f'height="{frame.bottom - TOP}"/>',
        f'<text class="hint" x="{frame.right - 5}" y="{TOP + 14}" text-anchor="end">last quarter</text>',
        *frame.grid(lambda value: f"{value:g}".replace("-", "−")),
        *(frame.x_label(index, f"{index + 1}") for index in sorted({0, (frames - 1) // 2, frames - 1})),
        frame.x_title("frame"),
    ]
    ends = spread([frame.y(line[-1]) for line in lines.values()])
    for (index, (scale, line)), end in zip(enumerate(lines.items()), ends, strict=True):
        points = " ".join(f"{frame.x(i):.1f},{frame.y(value):.1f}" for i, value in enumerate(line))
        parts.append(f'<polyline class="line s{index}" points="{points}"/>')
        parts.append(f'<text class="tag s{index}" x="{frame.right + 7}" y="{end + 4:.1f}">{scale_name(scale)}</text>')
    return svg(parts, "Identity over the frames: mean cosine to the reference, for the base and each scale")


def motion_plot(comparison: Comparison) -> str:
    """Draws the motion of every clip as a ratio to the base: a dot for each clip, a bar at the median."""
    ratios = {s: [min(c.motion_ratio, _MOST_MOTION) for c in comparison.clips(s)] for s in comparison.scales}
    top = max(1.25, *(max(values) for values in ratios.values())) * 1.04
    frame = Frame((-0.5, len(ratios) - 0.5), (0.0, top))
    parts = [
        f'<rect class="zone" x="{LEFT}" y="{frame.y(0.5):.1f}" width="{frame.right - LEFT}" '
        f'height="{frame.bottom - frame.y(0.5):.1f}"/>',
        f'<text class="hint" x="{LEFT + 6}" y="{frame.bottom - 7}">half the motion is gone</text>',
        *frame.grid(lambda value: f"{100 * value:.0f} %"),
        f'<line class="rule s0" x1="{LEFT}" x2="{frame.right}" y1="{frame.y(1):.1f}" y2="{frame.y(1):.1f}"/>',
        f'<text class="tag s0" x="{frame.right + 7}" y="{frame.y(1) + 4:.1f}">base</text>',
        frame.x_title("LoRA scale"),
    ]
    for place, (scale, values) in enumerate(ratios.items()):
        x, middle = frame.x(place), frame.y(median(values))
        dots = sorted(values)
        for rank, value in enumerate(dots):
            # neighbours step aside in turn, so that equal values stay visible
            aside = 5 * ((rank % 3) - 1) if len(dots) > 1 else 0
            parts.append(f'<circle class="dot s{place + 1}" cx="{x + aside:.1f}" cy="{frame.y(value):.1f}" r="3.5"/>')
        parts.append(
            f'<line class="bar s{place + 1}" x1="{x - 17:.1f}" x2="{x + 17:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )
        parts.append(frame.x_label(place, scale_name(scale)))
    return svg(parts, "Motion of every clip as a ratio to the base at the same seed, for each scale")


def tradeoff_plot(comparison: Comparison) -> str:
    """Draws identity against motion: the path from the base through the scales."""
    places = [(min(comparison.motion(s), _MOST_MOTION), comparison.identity(s)) for s in (BASE, *comparison.scales)]
    low, high = padded([x for x, _ in places] + [KEPT_MOTION, 1.1])
    frame = Frame((max(0.0, low), high), padded(y for _, y in places))
    kept = frame.x(KEPT_MOTION)
    parts = [
        f'<rect class="zone" x="{LEFT}" y="{TOP}" width="{kept - LEFT:.1f}" height="{frame.bottom - TOP}"/>',
        *([_hint_left_of(kept, frame.bottom)] if kept - LEFT > 64 else []),
        *frame.grid(lambda value: f"{value:g}".replace("-", "−")),
        *(frame.x_label(tick, f"{100 * tick:.0f} %") for tick in ticks(*frame.across, 4)),
        frame.x_title("motion kept"),
        '<polyline class="path" points="' + " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in places) + '"/>',
    ]
    for index, (x, y) in enumerate(places):
        parts.append(f'<circle class="spot s{index}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="5.5"/>')
    labels = spread([frame.y(y) for _, y in places])
    for (index, (x, _)), label in zip(enumerate(places), labels, strict=True):
        scale = (BASE, *comparison.scales)[index]
        parts.append(
            f'<text class="tag s{index}" x="{frame.x(x) + 11:.1f}" y="{label + 4:.1f}">{scale_name(scale)}</text>'
        )
    return svg(parts, "Identity in the last quarter against motion kept, from the base through the scales")


def _hint_left_of(x: float, bottom: float) -> str:
    return f'<text class="hint" x="{x - 6:.1f}" y="{bottom - 7}" text-anchor="end">too still</text>'
