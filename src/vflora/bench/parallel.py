"""`vflora bench parallel`: what several GPUs are worth, in one call of torchrun.

    torchrun --standalone --nproc_per_node=2 -m vflora.cli bench parallel --steps 2 --output parallel.json

measures one training step of the real size in four ways: by one process alone, by all with samples of their own, the
same with the base in pieces, and by all on one sample. On a CPU, in seconds:

    torchrun --standalone --nproc_per_node=2 -m vflora.cli bench parallel --size small --resolution 64x64 \
        --frames 5 --dtype fp32 --device cpu --steps 1 --output parallel.json
"""

from __future__ import annotations

import gc
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from vflora.bench.setting import BenchConfig, Setting, build_setting
from vflora.bench.step import device_name, measure
from vflora.config import require
from vflora.determinism import deterministic
from vflora.devices import torch_device
from vflora.distributed.launch import process_count
from vflora.distributed.processes import ALONE, World, joined
from vflora.models.speed_config import SpeedConfig
from vflora.student import require_shareable

logger = logging.getLogger(__name__)

Way = Literal["alone", "data", "sharded", "sequence", "sharded_sequence"]


@dataclass(frozen=True)
class ParallelConfig:
    """The ways to compute."""

    ways: list[Way] = field(default_factory=lambda: ["alone", "data", "sharded", "sequence"])
    """alone: one process; data: a sample each; sharded: that and the base in pieces; sequence: all on one sample;
    sharded_sequence: that and the base in pieces."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.ways) - set(get_args(Way)))
        require(not unknown, f"--ways {' '.join(unknown)}: use {', '.join(get_args(Way))}.")
        require(bool(self.ways), "--ways is empty: name at least one.")


@dataclass(frozen=True)
class BenchParallelSettings:
    """Flags of `vflora bench parallel`."""

    parallel: ParallelConfig
    bench: BenchConfig
    speed: SpeedConfig


def run(settings: BenchParallelSettings) -> None:
    """Measures one way after the other; the first process prints, and writes JSON after each way.

    Raises:
        UserError: for settings that cannot work, or a single process.
    """
    size = process_count()
    require(
        size > 1,
        "vflora bench parallel compares several processes with one: start it with "
        "`torchrun --standalone --nproc_per_node=2 -m vflora.cli bench parallel`.",
    )
    config, device = settings.bench, torch_device(settings.bench.device)
    with joined(1, device) as together, deterministic(settings.speed.is_deterministic, device):
        worlds = {way: _world(way, together, device) for way in settings.parallel.ways}
        for way in worlds:
            require_shareable(settings.speed, sharded=_is_sharded(way))
        result: dict[str, Any] = {
            "device": device_name(device),
            "torch": torch.__version__,
            "processes": size,
            "bench": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
            "speed": asdict(settings.speed),
            "ways": {},
        }
        for way, world in worlds.items():
            together.agree(False)  # nobody begins to build while another one is still timed
            taken = _measure(way, settings, world, device) if world.size > 1 or together.is_main else None
            rows = [row for row in together.gather_over_data(taken) if row is not None]
            result["ways"][way] = _combined(rows)
            result |= _ratios(result["ways"])
            if together.is_main:
                logger.info("%s: %.2f s a step", way, result["ways"][way]["step_s"])
                if config.output is not None:
                    config.output.parent.mkdir(parents=True, exist_ok=True)
                    config.output.write_text(json.dumps(result, indent=1))
        if together.is_main:
            tqdm.write(table(result))


def _world(way: Way, together: World, device: torch.device) -> World:
    if way == "alone":
        return ALONE
    return together.regrouped(together.size if "sequence" in way else 1, device)


def _is_sharded(way: Way) -> bool:
    return "sharded" in way


def _measure(way: Way, settings: BenchParallelSettings, world: World, device: torch.device) -> dict[str, Any]:
    """Builds, steps, and frees; returns the numbers of this process."""
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    setting = build_setting(settings.bench, settings.speed, world, sharded=_is_sharded(way))
    built = {
        "build_s": time.perf_counter() - began,
        "build_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "base_gib": base_bytes(setting) / 2**30,
    }
    taken = built | measure(setting, settings.bench, world)
    del setting
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
    return taken


def base_bytes(setting: Setting) -> int:
    """Returns how many bytes of the frozen transformer this process holds."""
    held = 0
    for parameter in setting.denoiser.transformer.parameters():
        if not parameter.requires_grad:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held += local.numel() * local.element_size()
    return held


def _combined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The times of the first process, which waits for the others like all, and the memory of each."""
    every = ("peak_gib", "reserved_gib", "build_peak_gib", "base_gib")
    return rows[0] | {name: [row[name] for row in rows] for name in every}


def _ratios(ways: dict[str, Any]) -> dict[str, float]:
    """What is known so far: scaling of linear for samples of one's own, how much sooner a shared sample is done."""
    if "alone" not in ways:
        return {}
    alone, ratios = ways["alone"], {}
    for way, name in (
        ("data", "data_efficiency"),
        ("sharded", "sharded_efficiency"),
        ("sequence", "sequence_speedup"),
        ("sharded_sequence", "sharded_sequence_speedup"),
    ):
        if way in ways:
            ratios[name] = alone["step_s"] / ways[way]["step_s"]
    if "sharded" in ways:
        ratios["base_share"] = max(ways["sharded"]["base_gib"]) / alone["base_gib"][0]
    return ratios


def table(result: dict[str, Any]) -> str:
    """Formats the result: a line for each way, then the ratios."""
    lines = [f"{'way':<18}{'s/step':>9}{'base GiB':>10}{'peak GiB, of each process':>28}"]
    for way, taken in result["ways"].items():
        peaks = "-" if taken["peak_gib"][0] is None else ", ".join(f"{peak:.1f}" for peak in taken["peak_gib"])
        lines.append(f"{way:<18}{taken['step_s']:>9.2f}{max(taken['base_gib']):>10.2f}{peaks:>28}")
    lines += [f"{name}: {result[name]:.3f}" for name in result if isinstance(result[name], float)]
    return "\n".join(lines)
