"""The page of a running run, in parts: the browser asks for all of them and exchanges those that changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vflora.watch.curves import curves, number
from vflora.watch.run_state import RunState

PARTS = ("head", "figures", "previews", "plots", "clock", "links")
_SETTINGS = {
    "pipeline_dir": "Base model",
    "wds_root": "Data",
    "train_target_resolution": "Resolution",
    "train_video_length": "Frames",
    "lora_r": "Rank",
    "learning_rate": "Learning rate",
    "lambda_id": "Weight of identity",
    "trajectory_reuse": "Steps per rollout",
    "dtype": "Precision",
    "model_dir": "Backbone",
    "temperature": "Temperature",
}

_PLOTS = (
    (
        "Distillation loss",
        "Velocity error against the teacher at the harvested points, at most noise, at least noise, and all.",
        "Distillation loss over the steps, at high noise, at low noise, and their mean",
        {"high": "loss/distill_high_noise", "low": "loss/distill_low_noise", "all": "loss/distill"},
    ),
    (
        "Identity loss",
        "One minus the cosine between decoded frames and the character's picture.",
        "Identity loss over the steps",
        {"loss": "loss/identity"},
    ),
    ("Loss", "Of the identity head.", "Loss over the steps", {"loss": "loss"}),
    (
        "Cosine in training",
        "Of the first and the last frame compared: the last is where identity drifts.",
        "Cosine to the picture in training, of the first and the last frame that was compared",
        {"first": "cosine/first_frame", "last": "cosine/last_frame"},
    ),
    (
        "Same and different",
        "Cosine between pictures of one character, and of two.",
        "Cosine between pictures of the same and of different characters",
        {"different": "cosine/different", "same": "cosine/same"},
    ),
    (
        "Identity in validation",
        "Cosine to the held-out picture in the last quarter of a clip. The training optimised this embedder.",
        "Cosine to the held-out picture in the last quarter of the clip, teacher and student",
        {"teacher": "val/teacher_cosine_last_quarter", "student": "val/student_cosine_last_quarter"},
    ),
    (
        "Motion ratio",
        "Student against teacher at the same noise. In the shaded part half the motion is gone.",
        "Motion of the student as a ratio to the teacher at the same noise",
        {"ratio": "val/motion_ratio"},
    ),
    (
        "Teacher deviation",
        "Velocity error on the teacher's own way to a held-out clip.",
        "Velocity error against the teacher in validation",
        {"deviation": "val/teacher_deviation"},
    ),
    (
        "Retrieval",
        "Mean average precision at R on validation pictures.",
        "Mean average precision at R",
        {"head": "val/map_at_r"},
    ),
    (
        "Gradient norm",
        "Before it is cut to its limit.",
        "Norm of the gradient over the steps",
        {"norm": "gradient_norm"},
    ),
)
"""Every plot: title, what it means, what to say to who cannot see it, and the metric of each line by its label."""
_MARKS = {"Motion ratio": {"rule": 1.0, "zone_below": 0.5}}

_environment = Environment(
    loader=PackageLoader("vflora.watch", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_parts(run: RunState, link: Callable[[Path], str], step: int | None = None) -> dict[str, str]:
    """Returns the HTML of every part.

    Args:
        run: what is known.
        link: turns a file into the address that it is served at.
        step: show the clips of this validation; the newest without it, or where that one has none.
    """
    steps = sorted({preview.step for preview in run.previews})
    shown = step if step in steps else steps[-1] if steps else None
    values = {
        "run": run,
        "link": link,
        "steps": steps,
        "shown": shown,
        "previews": [preview for preview in run.previews if preview.step == shown],
        "plots": _plots(run),
        "split": run.step_split(),
        "settings": {label: run.settings[name] for name, label in _SETTINGS.items() if run.settings.get(name)},
        "duration": duration,
        "number": number,
        "has_identity_judge": run.last("val/student_cosine_last_quarter") is not None,
    }
    return {part: _environment.get_template(f"parts/{part}.html.j2").render(values).strip() for part in PARTS}


def render_page(run: RunState, parts: dict[str, str], refresh_s: float) -> str:
    """Returns the whole page with its parts in place."""
    return _environment.get_template("page.html.j2").render(
        title=run.name,
        marks=marks(parts),
        parts={name: Markup(html) for name, html in parts.items()},
        style=Markup(_text("vflora.report", "page.css") + _text("vflora.watch", "watch.css")),
        script=Markup(_text("vflora.watch", "watch.js")),
        refresh_ms=round(1000 * refresh_s),
    )


def marks(parts: dict[str, str]) -> dict[str, str]:
    """Returns a short digest of every part, by which the browser knows what changed."""
    return {name: hashlib.sha256(html.encode()).hexdigest()[:16] for name, html in parts.items()}


def duration(seconds: float) -> str:
    """Returns a time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 1:
        return f"{minutes} min {whole % 60} s" if minutes < 10 else f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def _plots(run: RunState) -> list[dict[str, Any]]:
    """Every plot that has something to show: title, drawing, what it means."""
    plots = []
    for title, note, description, names in _PLOTS:
        svg = curves({label: run.series(name) for label, name in names.items()}, description, **_MARKS.get(title, {}))
        if svg is not None:
            plots.append({"title": title, "svg": Markup(svg), "note": note})
    return plots


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")
