"""`vflora bench table`: the README's table of modes, each row measured by `vflora bench step` in a process of its own.

A row that has been measured with the same settings is kept, so a table that was cut off goes on where it stopped;
delete its file in rows/ to measure it anew.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from vflora.atomic import replace_file
from vflora.bench.setting import BenchConfig
from vflora.config import Precision, require
from vflora.models.speed_config import Mode, SpeedConfig

CARDS_GIB = (12, 16, 24, 32, 48, 80)
"""Sizes of consumer and workstation cards."""
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class BenchTableConfig:
    """Which rows there are: every combination of these."""

    output: Path
    """Folder: table.json, table.md, and rows/ with the numbers and the log of each row."""
    modes: list[Mode] = field(default_factory=lambda: ["exact", "fast", "low_memory"])
    """Presets of the speed flags."""
    resolutions: list[str] = field(default_factory=lambda: ["480x848"])
    """HEIGHTxWIDTH of the clip, pixels."""
    frames: list[int] = field(default_factory=lambda: [17])
    """Frames of the clip, 4n+1."""
    decodes: list[Literal["full", "half"]] = field(default_factory=lambda: ["full", "half"])
    """Identity decode at full size, or at half."""
    reuses: list[int] = field(default_factory=lambda: [1])
    """Optimizer steps that share a rollout."""
    size: Literal["real", "small"] = "real"
    """real: the true sizes; small: seconds on a CPU."""
    steps: int = 4
    """Timed steps of each row."""
    dtype: Precision = "bf16"
    """Precision of the frozen weights."""
    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""
    card_gib: float | None = None
    """Let every row have so much of the GPU's memory and no more, to see which fit a smaller card."""
    headroom_gib: float = 2.0
    """Memory a card must have besides the peak: the desktop, the driver, fragments, longer prompts."""
    row_minutes: float = 15.0
    """A row that takes longer is given up, and measured again next time."""

    def __post_init__(self) -> None:
        require(self.headroom_gib >= 0, "--headroom_gib must not be negative.")
        require(self.row_minutes > 0, "--row_minutes must be above 0.")
        for row in rows(self):
            row.settings(self)  # refuses what no row may have


@dataclass(frozen=True)
class Row:
    """One combination."""

    mode: str
    resolution: str
    frames: int
    decode: str
    reuse: int

    @property
    def name(self) -> str:
        """A name for its files."""
        return f"{self.mode}-{self.resolution}-{self.frames}-{self.decode}-{self.reuse}"

    def settings(self, table: BenchTableConfig) -> BenchConfig:
        """Returns what `vflora bench step` is asked for."""
        return BenchConfig(
            size=table.size,
            resolution=self.resolution,
            frames=self.frames,
            id_decode_downsample_mode="area" if self.decode == "half" else "false",
            trajectory_reuse=self.reuse,
            dtype=table.dtype,
            device=table.device,
            card_gib=table.card_gib,
            steps=table.steps,
        )

    def command(self, table: BenchTableConfig) -> list[str]:
        """Returns the command line, without what is the default anyway."""
        settings = self.settings(table)
        given = {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}
        words = ["vflora", "bench", "step", "--mode", self.mode]
        return words + [word for name, value in given.items() for word in (f"--{name}", str(value))]


def rows(config: BenchTableConfig) -> list[Row]:
    """Returns every combination, in the order of the flags."""
    parts = (config.modes, config.resolutions, config.frames, config.decodes, config.reuses)
    return [Row(*values) for values in itertools.product(*parts)]


def run(config: BenchTableConfig) -> int:
    """Measures what has not been measured, and writes table.json and table.md after every row.

    Returns:
        1 if a row failed for another reason than memory, which its log tells; else 0.
    """
    (config.output / "rows").mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for row in tqdm(rows(config), desc="rows", unit="row"):
        result = _kept(config, row) or _measured(config, row)
        results.append(result)
        tqdm.write(f"{row.name}: {_said(result)}")
        _write(config, results)
    tqdm.write(markdown(results, config.headroom_gib))
    failed = [result["row"] for result in results if result.get("failed") not in (None, OUT_OF_MEMORY)]
    for name in failed:
        tqdm.write(f"{name} failed: see {config.output / 'rows' / name}.log; the next call tries it again")
    return 1 if failed else 0


def _kept(config: BenchTableConfig, row: Row) -> dict[str, Any] | None:
    path = config.output / "rows" / f"{row.name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    asked = _asked(config, row)
    return result if {name: result.get(name) for name in asked} == asked else None


def _asked(config: BenchTableConfig, row: Row) -> dict[str, Any]:
    """What a row is measured with: the same words may come to other switches in another version."""
    return {"command": shlex.join(row.command(config)), "speed": asdict(SpeedConfig.preset(row.mode))}


def _measured(config: BenchTableConfig, row: Row) -> dict[str, Any]:
    folder, command = config.output / "rows", row.command(config)
    raw, log = folder / f".{row.name}.json", folder / f"{row.name}.log"
    raw.unlink(missing_ok=True)
    words = [sys.executable, "-m", "vflora.cli", *command[1:], "--output", str(raw)]
    facts = {"row": row.name, **_asked(config, row), **vars(row)}
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                words, stdout=stream, stderr=subprocess.STDOUT, timeout=60 * config.row_minutes, env=os.environ
            ).returncode
        except subprocess.TimeoutExpired:
            return facts | {"failed": f"took more than {config.row_minutes:g} minutes"}
    if code:
        text = log.read_text(errors="replace")
        if "OutOfMemoryError" not in text:
            return facts | {"failed": f"exit code {code}"}
        result = facts | {"failed": OUT_OF_MEMORY}
    else:
        result = facts | json.loads(raw.read_text())
        raw.unlink()
    replace_file(folder / f"{row.name}.json", lambda path: path.write_text(json.dumps(result, indent=1)))
    return result


def _said(result: dict[str, Any]) -> str:
    return result["failed"] if "failed" in result else f"{result['step_s']:.2f} s a step"


def _write(config: BenchTableConfig, results: Sequence[dict[str, Any]]) -> None:
    content = {"headroom_gib": config.headroom_gib, "rows": [_summary(r, config.headroom_gib) for r in results]}
    replace_file(config.output / "table.json", lambda path: path.write_text(json.dumps(content, indent=1)))
    text = markdown(results, config.headroom_gib)
    replace_file(config.output / "table.md", lambda path: path.write_text(text))


def _summary(result: dict[str, Any], headroom_gib: float) -> dict[str, Any]:
    asked = {name: result[name] for name in ("mode", "resolution", "frames", "decode", "reuse", "command")}
    if "failed" in result:
        return asked | {"failed": result["failed"]}
    return asked | {
        "s_per_step": result["step_s"],
        "samples_per_hour": 3600 / result["step_s"] * result["bench"]["batch_size"],
        "peak_gib": result["peak_gib"],
        "smallest_card_gib": smallest_card(result["peak_gib"], headroom_gib),
        "parts_s": result["parts_s"],
        "device": result["device"],
        "torch": result["torch"],
    }


def smallest_card(peak_gib: float | None, headroom_gib: float) -> int | None:
    """Returns the smallest card that has the peak and the headroom; None if none has, or nobody measured."""
    if peak_gib is None:
        return None
    return next((card for card in CARDS_GIB if peak_gib + headroom_gib <= card), None)


def markdown(results: Sequence[dict[str, Any]], headroom_gib: float) -> str:
    """Formats results as the README's table."""
    lines = [
        "| mode | resolution | frames | identity decode | steps per rollout | s/step | samples/hour | peak GiB | card "
        "| command |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        row = _summary(result, headroom_gib)
        asked = [row["mode"], row["resolution"], row["frames"], row["decode"], row["reuse"]]
        if "failed" in row:
            measured = [row["failed"], "-", "-", "-"]
        else:
            peak, card = row["peak_gib"], row["smallest_card_gib"]
            measured = [
                f"{row['s_per_step']:.2f}",
                f"{row['samples_per_hour']:,.0f}",
                "-" if peak is None else f"{peak:.1f}",
                "-" if peak is None else f"over {CARDS_GIB[-1]} GB" if card is None else f"{card} GB",
            ]
        lines.append("| " + " | ".join(map(str, [*asked, *measured, f"`{row['command']}`"])) + " |")
    devices = sorted({f"{r['device']}, torch {r['torch']}" for r in results if "failed" not in r})
    lines += [
        "",
        f"Card: the smallest of {', '.join(map(str, CARDS_GIB))} GB that has the peak and {headroom_gib:g} GiB more. "
        f"Measured on: {'; '.join(devices) or 'nothing yet'}.",
        "",
    ]
    return "\n".join(lines)
