"""The ablation as pictures: identity against motion, identity over time, and what the videos look like."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from vflora.world.ablation.arm import FRAMES
from vflora.world.ablation.arms import ARMS
from vflora.world.ablation.summary import FORGETTING, IDENTITY, PATH_TOLERANCE, Results, number, ratio_to_base

_ENLARGED, _CLIPS = 1.5, 2


def draw_plot(results: Results, path: Path) -> None:
    """Writes a PNG: identity against motion, against what was forgotten, and over the frames.

    Points have error bars over seeds. Beside what was forgotten stand the arms that keep the motion; the others have
    forgotten many times as much.
    """
    figure = Figure(figsize=(17, 6.4), layout="constrained")
    motion_axes, loss_axes, time_axes = figure.subplots(1, 3)
    colours = matplotlib.colormaps["tab20"]
    for row, (arm, own) in enumerate(results.items()):
        identity = number(results, arm, IDENTITY)
        look = {"color": colours(row % 20), "label": ARMS[arm].title}
        motion, loss = (ratio_to_base(results, arm, name) for name in ("path_ratio", "base_domain_loss"))
        places = [(motion_axes, motion)]
        if abs(motion.mean - 1) <= PATH_TOLERANCE:
            places.append((loss_axes, loss))
        for axes, ratio in places:
            axes.errorbar(
                ratio.mean, identity.mean, xerr=ratio.deviation, yerr=identity.deviation, fmt="o", capsize=3, **look
            )
        frames = [sum(values) / len(own) for values in zip(*(r["cosine_by_frame"] for r in own), strict=True)]
        width = 2.5 if arm in ("base", "recipe", "oracle") else 1
        time_axes.plot(range(1, len(frames)), frames[1:], linewidth=width, **look)
    motion_axes.set(xlabel="motion: path length, ratio to the base", ylabel="identity in the last quarter (cosine)")
    motion_axes.axvspan(1 - PATH_TOLERANCE, 1 + PATH_TOLERANCE, alpha=0.08, color="green")
    loss_axes.set(xlabel="forgotten: loss on the base's own domain, ratio to the base")
    loss_axes.axvspan(1, FORGETTING, alpha=0.08, color="green")
    time_axes.set(xlabel="frame", ylabel="identity (cosine to the right character)")
    for axes in (motion_axes, loss_axes, time_axes):
        axes.grid(alpha=0.25)
    handles, titles = motion_axes.get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_grid(results: Results, output: Path, path: Path) -> None:
    """Writes a PNG: a row for each arm, with the first clips of its first seed, every fourth frame."""
    rows = []
    for arm, own in results.items():
        with Image.open(output / "arms" / f"{arm}-{own[0]['seed']}" / FRAMES) as picture:
            rows.append((ARMS[arm].title, picture.convert("RGB")))
    side = rows[0][1].width // 5
    clips = min(_CLIPS, rows[0][1].height // side)
    cell = round(side * _ENLARGED)
    font = ImageFont.load_default(13)
    label = 18 + round(max(font.getlength(title) for title, _ in rows))
    grid = Image.new("RGB", (label + clips * (5 * cell + 8), len(rows) * (cell + 4)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (title, picture) in enumerate(rows):
        top = row * (cell + 4)
        draw.text((6, top + cell // 2 - 8), title, fill="black", font=font)
        for clip in range(clips):
            strip = picture.crop((0, clip * side, picture.width, (clip + 1) * side))
            grid.paste(strip.resize((5 * cell, cell), Image.Resampling.NEAREST), (label + clip * (5 * cell + 8), top))
    grid.save(path)
