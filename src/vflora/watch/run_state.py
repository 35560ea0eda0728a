"""What a run's folder says so far: numbers by step, clips, comparison pages, and the time that is left."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from vflora.errors import UserError
from vflora.previews import Preview, find_previews

_RECENT = 50
_TOTALS = ("max_train_steps", "total_steps")
_VALIDATE_EVERY = ("val_every_steps", "val_every")
_LOG_EVERY = ("log_every_steps", "log_every")
_QUIET_S = 120.0


@dataclass(frozen=True)
class RunState:
    """A run as its folder shows it at one moment.

    Attributes:
        name: of the folder.
        settings: of config.yaml, by flag.
        rows: lines of metrics.jsonl, finite numbers only, each with its step.
        previews: clips of every validation.
        comparisons: comparison pages below the folder.
        age_s: seconds since the last line of metrics; None without one.
    """

    name: str
    settings: Mapping[str, Any]
    rows: tuple[Mapping[str, float], ...]
    previews: tuple[Preview, ...]
    comparisons: tuple[Path, ...]
    age_s: float | None

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as they were logged."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def total(self) -> int | None:
        """Optimizer steps of the whole run, if the settings say so."""
        return self._count(_TOTALS)

    @property
    def log_every(self) -> int:
        """Optimizer steps from one line of metrics to the next."""
        return self._count(_LOG_EVERY) or 1

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.total is not None and self.step >= self.total

    @property
    def is_quiet(self) -> bool:
        """Whether it is long since the run said something: it may have stopped."""
        expected = self.seconds_per_step() * self.log_every
        pauses = self.last("seconds/validation") or 0.0
        return not self.is_done and self.age_s is not None and self.age_s > max(_QUIET_S, 3 * expected + 2 * pauses)

    def series(self, name: str) -> list[tuple[int, float]]:
        """Returns (step, value) of one metric."""
        return [(int(row["step"]), row[name]) for row in self.rows if name in row]

    def last(self, name: str) -> float | None:
        """Returns the newest value of one metric."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    def seconds_per_step(self) -> float:
        """Returns the median over the newest lines; 0 before the first."""
        recent = [value for _, value in self.series("seconds/step")[-_RECENT:]]
        return median(recent) if recent else 0.0

    def seconds_left(self) -> float | None:
        """Estimates the rest of the run: its steps, and its validations as long as the last one took."""
        if self.total is None or not self.seconds_per_step():
            return None
        left = max(0, self.total - self.step)
        every = self._count(_VALIDATE_EVERY)
        pauses = math.ceil(left / every) * (self.last("seconds/validation") or 0.0) if every else 0.0
        return left * self.seconds_per_step() + pauses

    def step_split(self) -> dict[str, float]:
        """Returns the seconds of each part of a step, as medians over the newest lines; the rest is "other"."""
        recent = [row for row in self.rows if "seconds/step" in row][-_RECENT:]
        names = dict.fromkeys(name for row in recent for name in row if name.startswith("seconds/"))
        parts = {
            name.removeprefix("seconds/").replace("_", " "): median(row.get(name, 0.0) for row in recent)
            for name in names
            if name not in ("seconds/step", "seconds/validation")
        }
        other = self.seconds_per_step() - sum(parts.values())
        return parts | ({"other": other} if parts and other > 0 else {})

    def _count(self, names: tuple[str, ...]) -> int | None:
        """Returns the setting that the two trainings call by different names."""
        return next((int(self.settings[name]) for name in names if self.settings.get(name)), None)


def read_run(folder: Path) -> RunState:
    """Reads the folder of a run, whatever of it is there already.

    Raises:
        UserError: if it is no folder of a run.
    """
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.is_file() and not config.is_file():
        raise UserError(
            f"{folder} holds neither metrics.jsonl nor config.yaml: give the --output_dir of a training run, "
            "once it has begun."
        )
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    return RunState(
        name=folder.resolve().name,
        settings=settings if isinstance(settings, dict) else {},
        rows=tuple(_rows(metrics)) if metrics.is_file() else (),
        previews=find_previews(folder),
        comparisons=tuple(sorted(page for page in _comparisons(folder))),
        age_s=max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else None,
    )


def _rows(path: Path) -> list[dict[str, float]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that is being written
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({k: v for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)})
    return rows


def _comparisons(folder: Path) -> list[Path]:
    """Pages that `vflora compare` wrote into the run's folder: index.html with its numbers beside it."""
    pages = [*folder.glob("*/index.html"), *folder.glob("*/*/index.html")]
    return [page for page in pages if (page.parent / "index.json").is_file()]
