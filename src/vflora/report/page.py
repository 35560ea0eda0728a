"""Puts the page together: one HTML file with videos, pictures, plots, style and script inside."""

from __future__ import annotations

import base64
import io
import json
import math
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from vflora.errors import UserError
from vflora.report.plots import identity_plot, motion_plot, tradeoff_plot
from vflora.report.records import BASE, Clip, Comparison, scale_name
from vflora.video_io import enlarge, read_mp4, write_mp4

_SMALL_SIDE = 320
"""Pictures and videos of which two or more fit into this are enlarged to it, pixel by pixel."""
_LEAST_BAR = 0.05
"""Gain that fills a bar of the table where no gain is larger, so that noise looks like noise."""
_ENCODINGS = ((480, 20), (480, 25), (416, 28), (352, 30), (288, 32), (224, 34))
"""Longest side and quality to try, one after the other, until the page is small enough."""


def write_page(comparison: Comparison, folder: Path, *, max_megabytes: float = 25.0) -> Path:
    """Writes index.html and index.json into `folder`.

    Args:
        comparison: what to show; the videos are read from their files.
        folder: to write into.
        max_megabytes: limit for the page; videos are encoded smaller until it is kept.

    Returns:
        The page.

    Raises:
        UserError: if the page cannot be made that small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    html = ""
    posters = {clip.path: _poster(clip) for row in comparison.rows for clip in row.clips}
    for side, crf in _ENCODINGS:
        videos = {clip.path: _encoded(clip, side, crf, comparison.fps) for clip in _progress(comparison, side)}
        html = render_page(comparison, videos, posters)
        if len(html.encode()) <= max_megabytes * 1e6:
            break
    else:
        raise UserError(
            f"The page has {len(html.encode()) / 1e6:.0f} MB and may have {max_megabytes:g}: compare fewer pictures "
            "or scales, shorten --video_length, or raise --max_page_mb."
        )
    (folder / "index.json").write_text(
        json.dumps(comparison.as_json(), indent=1, ensure_ascii=False, default=str, allow_nan=False) + "\n",
        encoding="utf-8",
    )
    page = folder / "index.html"
    page.write_text(html, encoding="utf-8")
    return page


def render_page(comparison: Comparison, videos: dict[Path, bytes], posters: dict[Path, str]) -> str:
    """Returns the HTML.

    Args:
        comparison: what to show.
        videos: by the path of a clip, the mp4 as it shall be inside the page.
        posters: the picture to show until it plays, as a data URI.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "cosine": _cosine,
        "signed": _signed,
        "change": _change,
        "percent": _percent,
        "short": _short,
        "scale": scale_name,
    }
    best = comparison.best_scale
    return environment.from_string(_part("page.html.j2")).render(
        comparison=comparison,
        rows=comparison.ranked(),
        best=best,
        base=BASE,
        ramp=_ramp(len(comparison.scales)),
        plots=[Markup(draw(comparison)) for draw in (identity_plot, motion_plot, tradeoff_plot)],
        style=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        picture=lambda row: _data_uri(Image.open(row.picture), _SMALL_SIDE),
        poster=lambda clip: posters[clip.path],
        mp4=lambda clip: Markup(base64.b64encode(videos[clip.path]).decode()),
        widest=max(_LEAST_BAR, *(abs(row.gain(scale)) for row in comparison.rows for scale in comparison.scales)),
        frames=len(comparison.rows[0].clips[0].scores.identity.cosines),
        has_flow=comparison.rows[0].clips[0].scores.motion.flow is not None,
    )


def _part(name: str) -> str:
    return resources.files("vflora.report").joinpath(name).read_text(encoding="utf-8")


def _progress(comparison: Comparison, side: int) -> Any:
    clips = [clip for row in comparison.rows for clip in row.clips]
    return tqdm(clips, desc=f"page, {side} pixels", unit="video", leave=False)


def _poster(clip: Clip) -> str:
    return _data_uri(Image.fromarray(read_mp4(clip.path)[0][-1]), _SMALL_SIDE)


def _encoded(clip: Clip, side: int, crf: int, fps: float) -> bytes:
    frames, _ = read_mp4(clip.path)
    frames = enlarge(frames, _SMALL_SIDE)
    with tempfile.TemporaryDirectory() as folder:
        return write_mp4(Path(folder) / "clip.mp4", frames, fps, crf=crf, max_side=side).read_bytes()


def _data_uri(image: Image.Image, side: int) -> str:
    image = Image.fromarray(enlarge(np.asarray(image.convert("RGB"))[None], side)[0])
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ramp(count: int) -> list[int]:
    """Share of the accent colour of each scale, rising to 100."""
    return [100] if count == 1 else [round(35 + 65 * i / (count - 1)) for i in range(count)]


def _cosine(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "±0.00" if float(text) == 0 else text.replace("-", "−")


def _change(value: float) -> str:
    """Returns gain, loss, or same where the difference is nothing in the digits that are shown."""
    if round(value, 2) == 0:
        return "same"
    return "gain" if value > 0 else "loss"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %" if math.isfinite(ratio) else "∞"


def _short(value: float) -> str:
    if value == 0 or value >= 1e-3:
        return f"{value:.2g}"
    mantissa, exponent = f"{value:.1e}".split("e-")
    return f"{mantissa}e−{int(exponent)}"
