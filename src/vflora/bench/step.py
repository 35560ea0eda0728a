"""`vflora bench step`: the time of one training step, part by part, its peak memory, and the wait for the first."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from vflora.bench.setting import BenchConfig, Setting, build_setting
from vflora.determinism import deterministic
from vflora.devices import torch_device
from vflora.distributed.processes import ALONE, World
from vflora.learning import learn
from vflora.models.speed_config import SpeedConfig
from vflora.profiling import StepTracer
from vflora.step_clock import StepClock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchStepSettings:
    """Flags of `vflora bench step`."""

    bench: BenchConfig
    speed: SpeedConfig


def run(settings: BenchStepSettings) -> None:
    """Measures and prints; writes JSON if asked to.

    Raises:
        UserError: for settings that cannot work.
    """
    began = time.perf_counter()
    config = settings.bench
    with deterministic(settings.speed.is_deterministic, torch_device(config.device)):
        setting = build_setting(config, settings.speed)
        built_s = time.perf_counter() - began
        measured = measure(setting, config)
    result = {
        "device": device_name(setting.device),
        "torch": torch.__version__,
        "bench": {k: str(v) if k == "output" else v for k, v in asdict(config).items()},
        "speed": asdict(settings.speed),
        "build_s": built_s,
        **measured,
    }
    tqdm.write(table([result]))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(result, indent=1))


def measure(setting: Setting, config: BenchConfig, world: World = ALONE) -> dict[str, Any]:
    """Runs one rollout's worth of steps for warming up, then `config.steps` timed ones, in whole rollouts.

    All of `world` call it together, and the main process shows the progress.
    """
    reuse = config.trajectory_reuse
    timed = -(-config.steps // reuse) * reuse
    warm_up = max(reuse, 2)
    traces = Path() if config.output is None else config.output.with_suffix(".traces")
    tracer = StepTracer(config.profile_steps, traces, run=range(1, 1 + warm_up + timed))
    on_cuda = setting.device.type == "cuda"
    logger.info("the first step%s", ", which compiles" if setting.acceleration.config.compile else "")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    with tracer.step(1):
        first = one_step(setting, 0, world)
    with tqdm(total=warm_up - 1 + timed, desc="steps", unit="step", disable=not world.is_main) as bar:
        for step in range(1, warm_up):
            with tracer.step(step + 1):
                one_step(setting, step, world)
            bar.update()
        if on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rows = []
        for step in range(warm_up, warm_up + timed):
            with tracer.step(step + 1):
                rows.append(one_step(setting, step, world))
            bar.update()
    blocks = [rows[i : i + reuse] for i in range(0, timed, reuse)]
    totals = [sum(row["step"] for row in block) / reuse for block in blocks]
    parts = {part: sum(row.get(part, 0.0) for row in rows) / timed for part in rows[0]}
    return {
        "first_step_s": first["step"],
        "step_s": median(totals),
        "parts_s": parts,
        "steps_s": [row["step"] for row in rows],
        "peak_gib": peak_bytes(setting) / 2**30 if on_cuda else None,
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_cuda else None,
        "blocks_kept": setting.acceleration.recompute.kept,
    }


def peak_bytes(setting: Setting) -> int:
    """Returns the most memory that was in use; what graphs work in is reserved and never counts as allocated."""
    speed = setting.acceleration.config
    graphs = speed.rollout_graphs or speed.student_graphs
    return torch.cuda.max_memory_reserved() if graphs else torch.cuda.max_memory_allocated()


def one_step(setting: Setting, step: int, world: World = ALONE) -> dict[str, float]:
    """Takes one optimizer step as `vflora train` does, and returns the seconds of its parts and of the whole."""
    began = time.perf_counter()
    clock = StepClock(setting.device)
    for micro, lesson in enumerate(setting.source.lessons(step, clock)):
        learn(setting, lesson, step, micro, clock, world)
    with clock.part("optimizer"):
        world.reduce_gradients(setting.optimizer.gradients())
        setting.optimizer.step(step + 1)
    seconds = clock.seconds()
    setting.acceleration.end_step(world.least)
    return seconds | {"step": time.perf_counter() - began}


def device_name(device: torch.device) -> str:
    """Returns the accelerator's name, or the device's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def table(results: list[dict[str, Any]]) -> str:
    """Formats results, one line each."""
    parts = [name for name in results[0]["parts_s"] if name != "step"]
    lines = [f"{'mode':<12}{'s/step':>8}{'first':>8}{'peak GiB':>10}{'kept':>6}  " + "  ".join(parts)]
    for result in results:
        peak = "-" if result["peak_gib"] is None else f"{result['peak_gib']:.1f}"
        times = "  ".join(f"{result['parts_s'][name]:>{len(name)}.2f}" for name in parts)
        lines.append(
            f"{result['speed']['mode']:<12}{result['step_s']:>8.2f}{result['first_step_s']:>8.1f}{peak:>10}"
            f"{result['blocks_kept']:>6}  {times}"
        )
    return "\n".join(lines)
