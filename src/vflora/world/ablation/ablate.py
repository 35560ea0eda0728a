"""`vflora world ablate`: every arm with every seed, and what comes of it in a table, a plot and a grid of frames."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from vflora.atomic import replace_file
from vflora.config import require
from vflora.errors import UserError
from vflora.settings import flat_settings
from vflora.world.ablation.arm import RESULT, arm_folder
from vflora.world.ablation.arms import ARMS, arm_named
from vflora.world.ablation.embedders import embedder_sights, sight_table
from vflora.world.ablation.lab import LabConfig, prepare
from vflora.world.ablation.pictures import draw_grid, draw_plot
from vflora.world.ablation.summary import gate_table, gates, read_results, table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblateConfig:
    """Which arms, how often, and how many at a time."""

    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """Arms to run."""
    seeds: int = 3
    """Runs of each arm."""
    jobs: int = 1
    """Arms that run at the same time, each a process of its own; small models leave room for several on one GPU, and
    several GPUs are taken in turn."""

    def __post_init__(self) -> None:
        for arm in self.arms:
            arm_named(arm)
        require(bool(self.arms), f"--arms is empty: choose among {', '.join(ARMS)}.")
        require(self.seeds >= 1, "--seeds must be at least 1.")
        require(self.jobs >= 1, "--jobs must be at least 1.")


@dataclass(frozen=True)
class AblateSettings:
    """What all arms share, and which of them run."""

    lab: LabConfig
    ablate: AblateConfig


def run(settings: AblateSettings) -> Path:
    """Runs what is not finished yet, and writes results.md, results.json, plot.png and grid.png.

    Returns:
        The file with the table.

    Raises:
        UserError: for settings unlike those that the folder was begun with, and naming the arms that failed.
    """
    lab, config = settings.lab, settings.ablate
    lab.output.mkdir(parents=True, exist_ok=True)
    _require_same_lab(lab)
    prepare(lab, place_bound=any(arm_named(arm).place_bound for arm in config.arms))
    # seeds outside, so that an ablation that is stopped early has compared all arms
    wanted = [(arm, seed) for seed in range(config.seeds) for arm in config.arms]
    open_jobs = [job for job in wanted if not (arm_folder(lab, *job) / RESULT).exists()]
    failed = _run_jobs(lab, open_jobs, config.jobs)
    if failed:
        logs = " ".join(str(arm_folder(lab, *job) / "log.txt") for job in failed)
        raise UserError(f"{len(failed)} of {len(wanted)} arms failed: read {logs}; the same command goes on from here.")
    return write_report(lab)


def write_report(lab: LabConfig) -> Path:
    """Writes table, gates, what the embedder sees, plot and grid of everything that is finished."""
    results = read_results(lab.output)
    found = gates(results)
    sights = embedder_sights(lab)
    text = f"{table(results)}\n{gate_table(found)}\n{sight_table(sights)}"
    record = {
        "gates": [asdict(gate) for gate in found],
        "embedders": {name: asdict(sight) for name, sight in sights.items()},
        "results": results,
    }
    replace_file(lab.output / "results.json", lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    replace_file(lab.output / "results.md", lambda path: path.write_text(text))
    draw_plot(results, lab.output / "plot.png")
    draw_grid(results, lab.output, lab.output / "grid.png")
    logger.info("\n%s\n%s", text, lab.output / "results.md")
    return lab.output / "results.md"


def _require_same_lab(lab: LabConfig) -> None:
    """Arms are compared only if everything else was equal."""
    path, free = lab.output / "lab.yaml", {"output", "device"}
    settings = {name: value for name, value in flat_settings(lab).items() if name not in free}
    if path.exists():
        before = yaml.safe_load(path.read_text())
        changed = [f"--{name} was {before.get(name)}" for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(f"{lab.output} was begun with other settings ({', '.join(changed)}): use another --output.")
    replace_file(path, lambda unfinished: unfinished.write_text(yaml.safe_dump(settings)))


def _run_jobs(lab: LabConfig, jobs: list[tuple[str, int]], at_once: int) -> list[tuple[str, int]]:
    """Runs arms as processes; returns those that failed."""
    cores = max(1, len(os.sched_getaffinity(0)) // at_once)
    failed = []
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), desc="arms", unit="arm") as bar:
        running = {pool.submit(_run_job, lab, *job, environment(n, cores)): job for n, job in enumerate(jobs)}
        try:
            for done in as_completed(running):
                if done.result():
                    failed.append(running[done])
                bar.update()
                bar.set_postfix(last="-".join(map(str, running[done])), failed=len(failed))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # the arms at work had the same Ctrl-C; no other may begin
            raise
    return failed


def environment(number: int, cores: int) -> dict[str, str]:
    """Returns the environment of a job by its number: its share of the cores, and one of several GPUs in turn."""
    own = {"OMP_NUM_THREADS": str(cores), **os.environ}
    count = torch.cuda.device_count()
    if count > 1:
        visible = own.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        own["CUDA_VISIBLE_DEVICES"] = visible[number % count]
    return own


def _run_job(lab: LabConfig, arm: str, seed: int, own: dict[str, str]) -> int:
    folder = arm_folder(lab, arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        word for name, value in flat_settings(lab).items() if value is not None for word in (f"--{name}", str(value))
    ]
    command = [sys.executable, "-m", "vflora.cli", "world", "arm", "--arm", arm, "--seed", str(seed), *flags]
    with (folder / "log.txt").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=own, check=False).returncode
