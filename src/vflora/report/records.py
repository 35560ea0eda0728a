"""What a comparison found, and the few sums that the page, the card and the JSON share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from vflora.evaluate import IdentityScores, VideoScores

BASE = 0.0
"""The scale of the base model: a LoRA at scale 0 is no LoRA."""
KEPT_MOTION = 0.8
"""Share of the base model's motion below which a scale is not recommended."""


def scale_name(scale: float) -> str:
    """Returns "base", or the scale with at least one decimal, as it is shown."""
    return "base" if scale == BASE else f"{scale:g}" if scale % 1 else f"{scale:.1f}"


@dataclass(frozen=True)
class Clip:
    """One video of a comparison.

    Attributes:
        scale: of the LoRA; 0 is the base model.
        path: the mp4.
        scores: identity by an embedder that the training did not optimise, and motion.
        trained_identity: identity by the embedder that it did optimise, if there was one.
        motion_ratio: motion over that of the base at the same seed; 1 for the base.
        deviation: mean squared error of the velocity against the base's, on the base's own sampling path.
        deviation_by_sigma: the same by noise level.
    """

    scale: float
    path: Path
    scores: VideoScores
    trained_identity: IdentityScores | None = None
    motion_ratio: float = 1.0
    deviation: float = 0.0
    deviation_by_sigma: dict[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> float:
        """Identity over the last quarter of the frames, where it drifts most."""
        return self.scores.identity.last_quarter

    def numbers(self) -> dict[str, Any]:
        """Returns every number of the clip, ready for JSON; an infinite ratio becomes None."""
        trained = self.trained_identity
        return {
            "scale": self.scale,
            "video": f"videos/{self.path.name}",
            "identity": asdict(self.scores.identity) | {"drift": self.scores.identity.drift},
            "trained_identity": None if trained is None else asdict(trained) | {"drift": trained.drift},
            "motion": asdict(self.scores.motion),
            "motion_ratio": self.motion_ratio if math.isfinite(self.motion_ratio) else None,
            "teacher_deviation": self.deviation,
            "teacher_deviation_by_sigma": self.deviation_by_sigma,
        }


@dataclass(frozen=True)
class Row:
    """One picture, prompt and seed, through the base model and the LoRA at every scale.

    Attributes:
        character: name to show.
        prompt: that was given.
        seed: of the starting noise.
        picture: the reference as the model saw it, an image file.
        clips: the base first, then by scale.
    """

    character: str
    prompt: str
    seed: int
    picture: Path
    clips: tuple[Clip, ...]

    def at(self, scale: float) -> Clip:
        """Returns the clip at `scale`."""
        return next(clip for clip in self.clips if clip.scale == scale)

    def gain(self, scale: float) -> float:
        """Returns how much more identity the last quarter has than with the base model."""
        return self.at(scale).identity - self.at(BASE).identity


@dataclass(frozen=True)
class Comparison:
    """Everything on the page.

    Attributes:
        title: of the page and the model card.
        rows: in the order they were made.
        judge: name of the embedder that graded identity.
        trained_judge: name of the one that the training optimised, if it graded too.
        settings: name -> value, to show.
        command: that makes the page again.
        notice: shown plainly at the top, if any.
        fps: frames per second of the videos.
        together: names of the LoRAs where several acted together; they are not beside the page, as a single one is.
    """

    title: str
    rows: tuple[Row, ...]
    judge: str
    settings: dict[str, Any]
    command: str
    trained_judge: str | None = None
    notice: str | None = None
    fps: float = 24
    together: tuple[str, ...] = ()

    @property
    def scales(self) -> tuple[float, ...]:
        """The LoRA's scales, without the base."""
        return tuple(clip.scale for clip in self.rows[0].clips if clip.scale != BASE)

    def clips(self, scale: float) -> list[Clip]:
        """Returns the clips of all rows at `scale`."""
        return [row.at(scale) for row in self.rows]

    def identity(self, scale: float) -> float:
        """Mean identity over the last quarter."""
        return mean(clip.identity for clip in self.clips(scale))

    def drift(self, scale: float) -> float:
        """Mean change of the cosine over a clip."""
        return mean(clip.scores.identity.drift for clip in self.clips(scale))

    def motion(self, scale: float) -> float:
        """Median motion ratio to the base."""
        return median(clip.motion_ratio for clip in self.clips(scale))

    def deviation(self, scale: float) -> float:
        """Mean teacher deviation."""
        return mean(clip.deviation for clip in self.clips(scale))

    def better(self, scale: float) -> int:
        """In how many rows the last quarter has more identity than with the base model."""
        return sum(row.gain(scale) > 0 for row in self.rows)

    @property
    def best_scale(self) -> float:
        """The scale with the most identity among those that keep 80 % of the motion.

        Where none does, the one that keeps most of it.
        """
        moving = [scale for scale in self.scales if self.motion(scale) >= KEPT_MOTION]
        return max(moving, key=self.identity) if moving else max(self.scales, key=self.motion)

    def ranked(self) -> list[Row]:
        """Returns the rows at the best scale: the largest gain first, then the smallest, then the others."""
        by_gain = sorted(self.rows, key=lambda row: row.gain(self.best_scale), reverse=True)
        return by_gain if len(by_gain) < 3 else [by_gain[0], by_gain[-1], *by_gain[1:-1]]

    def as_json(self) -> dict[str, Any]:
        """Returns all numbers."""
        summary = {
            f"{scale:g}": {
                "identity_last_quarter": self.identity(scale),
                "drift": self.drift(scale),
                "motion_ratio_median": self.motion(scale) if math.isfinite(self.motion(scale)) else None,
                "teacher_deviation": self.deviation(scale),
                "better_than_base": self.better(scale),
            }
            for scale in (BASE, *self.scales)
        }
        return {
            "title": self.title,
            "notice": self.notice,
            "judge": self.judge,
            "trained_judge": self.trained_judge,
            "best_scale": self.best_scale,
            "summary": summary,
            "rows": [
                {
                    "character": row.character,
                    "prompt": row.prompt,
                    "seed": row.seed,
                    "picture": f"pictures/{row.picture.name}",
                    "clips": [clip.numbers() for clip in row.clips],
                }
                for row in self.rows
            ],
            "settings": self.settings,
            "command": self.command,
        }
