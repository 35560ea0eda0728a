"""`vflora world pretrain`: makes the miniature world's models, stage by stage, each within a budget of minutes."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline

from vflora.atomic import replace_file
from vflora.devices import one_thread, torch_device
from vflora.distributed.processes import claim_device
from vflora.errors import UserError
from vflora.world.base_training import BaseTraining, train_base
from vflora.world.characters import Domain, Split
from vflora.world.dino_training import DinoTraining, train_dino
from vflora.world.gates import gate_clips, motion_gate, sample_videos, save_grid, vae_gate
from vflora.world.grader import GRADER_CHARACTERS, GRADER_STEPS, save_grader, train_grader
from vflora.world.head_training import HEAD_STEPS, train_world_head
from vflora.world.models import WorldSizes
from vflora.world.training_loop import Clock
from vflora.world.vae_training import VaeTraining, make_fast, train_vae

logger = logging.getLogger(__name__)

Stage = Literal["vae", "dino", "head", "base", "grader", "all"]
_STAGES: dict[Stage, tuple[Stage, ...]] = {
    "vae": ("vae",),
    "dino": ("dino",),
    "head": ("head",),
    "base": ("base",),
    "grader": ("grader",),
    "all": ("vae", "dino", "head", "base", "grader"),
}
_MINUTES: dict[Stage, float] = {"vae": 6.0, "dino": 1.5, "base": 7.0}
"""With head and grader that is to make 20 minutes on one H200."""
_GATE_SETS: tuple[tuple[Domain, Split], ...] = (("geometric", "dev"), ("creatures", "dev"))


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining of the miniature world."""

    output: Path
    """Folder of the world: a diffusers pipeline, with DINOv3 in dino/ and the records of training in training/."""
    stage: Stage = "all"
    """What to train: vae, dino, head (which needs dino), base (which needs vae), grader (which needs nobody), or all
    in this order."""
    minutes: float | None = None
    """Time of a stage, preparations included; the learning rate follows it down to zero. By default 6 for the VAE, 1.5
    for DINOv3, 7 for the base. The head takes as long as its 300 steps do, the grader as its 2,500."""
    resume: bool = False
    """Go on from the weights and the state in the output folder."""
    compile: bool = True
    """Compile the networks: a minute at the start, then about twice as fast on an accelerator."""
    device: str = "auto"
    """Where to train: auto takes the accelerator if there is one, else the CPU."""
    seed: int = 0
    """Of everything that is random but the base's clips."""
    batch_size: int = 0
    """Samples per step, for head identities, for grader characters with 4 pictures each; 0 for the stage's own."""
    pool: int = 0
    """Clips held in memory, for dino stills per character, for head creatures; 0 for the stage's own."""
    base_split: Literal["train", "general"] = "general"
    """Whom the base sees: train, the 48 geometric characters of true shape; general, those for a third of the clips
    and the 1,920 with the bent ones for the rest."""
    clip_seed: int = 0
    """Of the base's clips: another one when it is trained further, and it sees new ones."""
    gate_clips: int = 128
    """Clips that the gates measure per domain."""
    sampling_steps: int = 30
    """Steps of the base model's samples."""
    max_steps: int | None = None
    """Stop each stage after so many steps even if there is time left."""

    def __post_init__(self) -> None:
        if self.minutes is not None and self.minutes <= 0:
            raise UserError(f"--minutes {self.minutes} leaves no time to train: give a positive number.")
        if self.gate_clips < 1 or self.sampling_steps < 1:
            raise UserError("--gate_clips and --sampling_steps must be at least 1.")

    def torch_device(self) -> torch.device:
        """Returns the device that `device` stands for."""
        return torch_device(self.device)


def run(config: PretrainConfig, sizes: WorldSizes | None = None) -> None:
    """Trains the chosen stages, measures their gates, and writes weights, grids and numbers.

    Args:
        config: what to do.
        sizes: of the models; None for those that ship.

    Raises:
        UserError: for a stage whose forerunner is missing.
    """
    sizes, device = sizes or WorldSizes(), config.torch_device()
    claim_device(device, 1)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    with one_thread() if device.type == "cuda" else nullcontext():
        _run_stages(config, sizes, device)


def _run_stages(config: PretrainConfig, sizes: WorldSizes, device: torch.device) -> None:
    for stage in _STAGES[config.stage]:
        torch.backends.cudnn.benchmark = True
        clock = Clock(config.minutes or _MINUTES.get(stage, 0.0))
        common = {
            "folder": config.output,
            "clock": clock,
            "device": device,
            "seed": config.seed,
            "compiled": config.compile,
            "resume": config.resume,
            "max_steps": config.max_steps,
        }
        if stage == "vae":
            vae = train_vae(sizes, _sized(VaeTraining(), config), **common)
            torch.backends.cudnn.benchmark = False  # a gate sees every shape once
            _measure_vae(vae, sizes, config, device)
        elif stage == "dino":
            settings = DinoTraining()
            train_dino(
                sizes,
                replace(
                    settings,
                    batch_size=config.batch_size or settings.batch_size,
                    stills_per_character=config.pool or settings.stills_per_character,
                ),
                **common,
            )
        elif stage == "head":
            train_world_head(
                config.output,
                size=sizes.frame_size,
                steps=config.max_steps or HEAD_STEPS,
                creatures=config.pool,
                identities=config.batch_size,
                seed=config.seed,
                device=config.device,
            )
        elif stage == "grader":
            grader = train_grader(
                config.max_steps or GRADER_STEPS,
                device=device,
                seed=config.seed,
                characters=config.batch_size or GRADER_CHARACTERS,
            )
            config.output.mkdir(parents=True, exist_ok=True)
            replace_file(config.output / "grader.safetensors", partial(save_grader, grader))
        else:
            settings = replace(BaseTraining(), clip_seed=config.clip_seed)
            if config.base_split == "train":
                settings = replace(settings, splits=("train",))
            train_base(sizes, _sized(settings, config), **common)
            _measure_base(sizes, config, device)


def _sized(settings, config: PretrainConfig):
    return replace(settings, batch_size=config.batch_size or settings.batch_size, pool=config.pool or settings.pool)


def _measure_vae(
    vae: AutoencoderKLHunyuanVideo15, sizes: WorldSizes, config: PretrainConfig, device: torch.device
) -> None:
    make_fast(vae)
    results = []
    for domain, split in _GATE_SETS:
        _, clips = gate_clips(
            config.gate_clips, domain=domain, split=split, frames=sizes.frames, size=sizes.frame_size, device=device
        )
        gate, shown = vae_gate(vae, clips, domain)
        results.append(gate.summary())
        save_grid(config.output / "training" / f"vae-{domain}.png", clips.video, shown)
    _record(config.output / "training" / "vae-gate.json", results)


def _measure_base(sizes: WorldSizes, config: PretrainConfig, device: torch.device) -> None:
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(config.output)
    make_fast(pipeline.vae)
    pipeline.to(device)
    results = []
    for domain, split in _GATE_SETS:
        scenes, clips = gate_clips(
            config.gate_clips,
            domain=domain,
            split=split,
            frames=sizes.frames,
            size=sizes.frame_size,
            device=device,
            posts=0.0,
        )
        for guidance in (1.0, sizes.guidance_scale):
            videos = sample_videos(
                pipeline,
                scenes,
                clips,
                steps=config.sampling_steps,
                guidance_scale=guidance,
                seed=config.seed,
            )
            gate = motion_gate(videos, scenes, clips, domain)
            results.append({**gate.summary(), "guidance_scale": guidance})
        save_grid(config.output / "training" / f"base-{domain}.png", clips.video, videos)
    _record(config.output / "training" / "base-gate.json", results)


def _record(path: Path, results: list[dict]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        logger.info("%s", json.dumps({k: v for k, v in result.items() if not isinstance(v, tuple | list)}))
