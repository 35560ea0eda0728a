"""The ablation as pictures: identity against motion, identity over time, and what the videos look like."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vflora.world.ablation.arm import FRAMES
from vflora.world.ablation.arms import ARMS
from vflora.world.ablation.summary import IDENTITY, Results, number, ratio_to_base

_LABEL, _ENLARGED, _CLIPS = 190, 1.5, 2


def draw_plot(results: Results, path: Path) -> None:
    """Writes a PNG: one point per arm with error bars over seeds, and the course of identity over the frames."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    against, over = figure.subplots(1, 2)
    colours = matplotlib.colormaps["tab20"]
    for row, (arm, own) in enumerate(results.items()):
        identity, motion = number(results, arm, IDENTITY), ratio_to_base(results, arm, "path_ratio")
        look = {"color": colours(row % 20), "label": ARMS[arm].title}
        against.errorbar(
            motion.mean, identity.mean, xerr=motion.deviation, yerr=identity.deviation, fmt="o", capsize=3, **look
        )
        frames = [sum(values) / len(own) for values in zip(*(r["cosine_by_frame"] for r in own), strict=True)]
        over.plot(
            range(1, len(frames)), frames[1:], linewidth=2.5 if arm in ("base", "recipe", "oracle") else 1, **look
        )
    against.set(xlabel="motion: path length, ratio to the base", ylabel="identity in the last quarter (cosine)")
    against.axvspan(0.9, 1.1, alpha=0.08, color="green")
    over.set(xlabel="frame", ylabel="identity (cosine to the right character)")
    against.legend(fontsize=7)
    for axes in (against, over):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def draw_grid(results: Results, output: Path, path: Path) -> None:
    """Writes a PNG: a row for each arm, with the first clips of its first seed, every fourth frame."""
    rows = []
    for arm, own in results.items():
        with Image.open(output / "arms" / f"{arm}-{own[0]['seed']}" / FRAMES) as picture:
            rows.append((ARMS[arm].title, picture.convert("RGB")))
    side = rows[0][1].width // 5
    clips = min(_CLIPS, rows[0][1].height // side)
    cell = round(side * _ENLARGED)
    grid = Image.new("RGB", (_LABEL + clips * (5 * cell + 8), len(rows) * (cell + 4)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for row, (title, picture) in enumerate(rows):
        top = row * (cell + 4)
        draw.text((6, top + cell // 2 - 8), title, fill="black", font=font)
        for clip in range(clips):
            strip = picture.crop((0, clip * side, picture.width, (clip + 1) * side))
            grid.paste(strip.resize((5 * cell, cell), Image.Resampling.NEAREST), (_LABEL + clip * (5 * cell + 8), top))
    grid.save(path)
