"""`vflora world ablate`: every arm with every seed, and what comes of it in a table, a plot and a grid of frames."""

from __future__ import annotations

import itertools
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from tqdm import tqdm

from vflora.atomic import replace_file
from vflora.cli import parse
from vflora.config import require
from vflora.errors import UserError
from vflora.settings import flat_settings
from vflora.world.ablation.arm import RESULT, arm_folder, train_flags
from vflora.world.ablation.arms import ARMS, arm_named
from vflora.world.ablation.embedders import embedder_sights, sight_table
from vflora.world.ablation.lab import LabConfig, prepare
from vflora.world.ablation.pictures import draw_grid, draw_plot
from vflora.world.ablation.summary import gate_table, gates, read_results, table

logger = logging.getLogger(__name__)

Job: TypeAlias = tuple[str, int]
"""An arm and a seed."""
Encoding: TypeAlias = tuple[bool, int]
"""Prompts and pictures that arms share: whether mixed, and a seed."""


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
    """Arms are compared only if everything else was equal, the defaults of the recipe among it."""
    path, free = lab.output / "lab.yaml", {"output", "device"}
    settings = {name: value for name, value in flat_settings(lab).items() if name not in free}
    settings = _recipe_of(lab) | settings
    if path.exists():
        before = yaml.safe_load(path.read_text())
        known = settings.keys() <= before.keys()
        require(known, f"{lab.output} was begun by another version of vflora: use another --output.")
        changed = [f"--{name} was {before.get(name)}" for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(f"{lab.output} was begun with other settings ({', '.join(changed)}): use another --output.")
    replace_file(path, lambda unfinished: unfinished.write_text(yaml.safe_dump(settings)))


def _recipe_of(lab: LabConfig) -> dict[str, Any]:
    """Returns what the recipe is, flag by flag, in this version of the package."""
    recipe = parse("train", train_flags(lab, arm_named("recipe"), lab.output, seed=0))
    flags = flat_settings(recipe.rollout, recipe.identity, recipe.lora, recipe.optimizer)
    places = {"dino_model_dir", "dino_head_path", "pretrained_lora_path"}
    return {name: value for name, value in flags.items() if name not in places}


def _run_jobs(lab: LabConfig, jobs: list[Job], at_once: int) -> list[Job]:
    """Runs arms as processes; returns those that failed."""
    cores = max(1, len(os.sched_getaffinity(0)) // at_once)
    numbers, failed, device = itertools.count(), [], lab.torch_device()
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), desc="arms", unit="arm") as bar:
        # First in the queue, so whoever waits for them waits for work that goes on.
        encodings = {
            key: pool.submit(_encode, lab, *key, environment(next(numbers), cores, device))
            for key in (_shared_encodings(jobs) if at_once > 1 else ())
        }
        running = {
            pool.submit(
                _run_job, lab, job, encodings.get(_encoding(job)), environment(next(numbers), cores, device)
            ): job
            for job in sorted(jobs, key=lambda job: _encoding(job) in encodings)
        }
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


def _encoding(job: Job) -> Encoding | None:
    """Which pictures and prompts an arm trains on: whether mixed, and the seed; None for clips."""
    arm = arm_named(job[0])
    return (arm.mixed, job[1]) if arm.kind == "recipe" else None


def _shared_encodings(jobs: list[Job]) -> list[Encoding]:
    """What several arms would encode. Arms of a seed walk in step: each would miss what the others are encoding."""
    counts = Counter(filter(None, map(_encoding, jobs)))
    return [encoding for encoding, arms in counts.items() if arms > 1]


def environment(number: int, cores: int, device: torch.device) -> dict[str, str]:
    """Returns the environment of a job by its number: its share of the cores, and one of several GPUs in turn.

    A GPU that `device` names is everybody's.
    """
    own = {"OMP_NUM_THREADS": str(cores), **os.environ}
    count = torch.cuda.device_count()
    if count > 1 and device.index is None:
        visible = own.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        own["CUDA_VISIBLE_DEVICES"] = visible[number % count]
    return own


def _encode(lab: LabConfig, mixed: bool, seed: int, own: dict[str, str]) -> Path | None:
    """Encodes what several arms will see; returns the log if that failed."""
    arm = next(arm for arm in ARMS.values() if arm.kind == "recipe" and arm.mixed == mixed)
    name = f"encoding-{'mixed-' if mixed else ''}{seed}"
    log = lab.output / "shared" / f"{name}.log"
    return log if _run("encode", train_flags(lab, arm, lab.output / "shared" / name, seed), log, own) else None


def _run_job(lab: LabConfig, job: Job, encoding: Future[Path | None] | None, own: dict[str, str]) -> int:
    log = arm_folder(lab, *job) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    if encoding is not None and (why := encoding.result()) is not None:
        log.write_text(f"its prompts and pictures could not be encoded: read {why}\n")
        return 1
    flags = [
        word for name, value in flat_settings(lab).items() if value is not None for word in (f"--{name}", str(value))
    ]
    return _run("world arm", ["--arm", job[0], "--seed", str(job[1]), *flags], log, own)


def _run(command: str, flags: list[str], log: Path, own: dict[str, str]) -> int:
    with log.open("a") as stream:
        words = [sys.executable, "-m", "vflora.cli", *command.split(), *flags]
        return subprocess.run(words, stdout=stream, stderr=stream, env=own, check=False).returncode
