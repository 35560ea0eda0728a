"""One training run on random models and random conditions, made of the same parts as a real one."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vflora.bench.models import build_embedder, build_transformer, build_vae
from vflora.config import (
    TORCH_DTYPES,
    DistributedConfig,
    IdentityConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Precision,
    PromptConfig,
    RolloutConfig,
    RunConfig,
    ValidationConfig,
    require,
    require_frames,
)
from vflora.data.config import DataConfig
from vflora.devices import limit_memory
from vflora.distributed.divisible import require_divisible
from vflora.distributed.processes import ALONE, World, claim_device
from vflora.distributed.sequence_parallel import enable_context_parallel
from vflora.distributed.sharding import shard
from vflora.distributed.strips import Strips
from vflora.flow import sampling_sigmas
from vflora.identity_term import IdentityTerm
from vflora.models.denoiser import Denoiser
from vflora.models.fast_teacher import harvested_sigmas
from vflora.models.lora import add_lora
from vflora.models.roles import Student
from vflora.models.speed import Acceleration, accelerate, accelerate_decoder
from vflora.models.speed_config import SpeedConfig
from vflora.optimizer import LoraOptimizer
from vflora.profiling import parse_steps
from vflora.random_streams import keyed_generator
from vflora.resolution import clip_size
from vflora.settings import TrainSettings
from vflora.teacher_source import TeacherSource
from vflora.types import Batch, Conditions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    size: Literal["real", "small"] = "real"
    """real: the true sizes (8.33 B transformer, 1.26 B VAE, DINOv3 ViT-L/16); small: seconds on a CPU."""
    resolution: str = "480x848"
    """HEIGHTxWIDTH of the clip, pixels."""
    frames: int = 17
    """Frames of the clip, 4n+1."""
    batch_size: int = 1
    """Samples per step."""
    id_decode_downsample_mode: Literal["false", "area", "bicubic"] = "false"
    """As in training: shrink the estimate before it is decoded."""
    id_decode_scale: float = 0.5
    """By which factor."""
    trajectory_reuse: int = 1
    """As in training: optimizer steps that share a rollout."""
    rollout_guidance_scale: float = 1.0
    """As in training; above 1 the teacher is asked twice, at every second point. The reference implementation has 1."""
    harvest_below: int = 0
    """As in training: distilled points below the deep one. The reference implementation has none."""
    id_timestep_frac: float = 0.68
    """Place of the deep point: of 25 steps point 17, the middle of the reference implementation's band."""
    prompt_tokens: int = 80
    """Tokens of a prompt; the picture has 729 of its own."""
    prompt_spread: int = 0
    """Prompts are up to so many tokens shorter or longer: kernels and graphs are prepared anew for every length."""
    lora_r: int = 16
    """Rank."""
    dtype: Precision = "bf16"
    """Precision of the frozen weights."""
    device: str = "auto"
    """Where to compute."""
    card_gib: float | None = None
    """Let PyTorch have so much of the GPU's memory and no more, to see what a smaller card does."""
    steps: int = 4
    """Steps that are timed, after one that is not; the median counts. With reuse, whole rollouts are timed."""
    seed: int = 0
    """Of everything random."""
    output: Path | None = None
    """JSON file for all numbers."""
    profile_steps: str | None = None
    """Steps to record with PyTorch's profiler, like 3-4, where 1 compiles; the trace goes beside --output."""

    def __post_init__(self) -> None:
        require_frames("frames", self.frames)
        require(self.steps >= 1, "--steps must be at least 1.")
        require(self.batch_size >= 1, "--batch_size must be at least 1.")
        require(0 <= self.id_timestep_frac < 1, "--id_timestep_frac is a place of the schedule: it lies in [0, 1).")
        require(
            0 <= self.prompt_spread < self.prompt_tokens,
            "--prompt_spread must be less than --prompt_tokens, and not negative.",
        )
        require(
            self.profile_steps is None or self.output is not None,
            "--profile_steps writes its trace beside the numbers: give --output FILE.json.",
        )
        if self.profile_steps is not None:
            parse_steps(self.profile_steps)


class RandomConditions:
    """Conditions of random numbers, of the sizes that prompts and pictures have; nothing is encoded."""

    def __init__(self, size: str, latent_shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype):
        """Takes the model's size and what the conditions go with."""
        self._widths = (3584, 1472, 1152) if size == "real" else (16, 32, 12)
        self._image_tokens = 729 if size == "real" else 6
        self._latent_shape, self._device, self._dtype = latent_shape, device, dtype

    def prepare(self, prompts: Sequence[str], images: Tensor) -> None:
        """Has nothing to prepare."""

    def encode(self, prompts: Sequence[str], images: Tensor) -> Conditions:
        """Returns conditions; a prompt has as many tokens as letters, and the blank one a single token."""
        rows = []
        channels, _, height, width = self._latent_shape
        for prompt in prompts:
            generator = keyed_generator("conditions", prompt)

            def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(1, *shape, generator=generator)

            tokens = max(1, len(prompt))
            rows.append(
                Conditions(
                    prompt_embeds=draw(tokens, self._widths[0]),
                    prompt_lengths=(tokens,),
                    prompt_embeds_2=torch.zeros(1, 0, self._widths[1]),
                    prompt_lengths_2=(0,),
                    image_embeds=draw(self._image_tokens, self._widths[2]),
                    first_frame=draw(channels, 1, height, width),
                )
            )
        return Conditions.stack(rows).to(self._device, self._dtype)


@dataclass
class Setting:
    """A run that is ready to be measured."""

    settings: TrainSettings
    device: torch.device
    denoiser: Denoiser
    student: Student
    identity: IdentityTerm
    optimizer: LoraOptimizer
    source: TeacherSource
    acceleration: Acceleration


def build_setting(config: BenchConfig, speed: SpeedConfig, world: World = ALONE, *, sharded: bool = False) -> Setting:
    """Builds models and everything around them, logging what it does.

    Args:
        config: what is measured.
        speed: switches.
        world: the processes, which call it together.
        sharded: whether each keeps a piece of the base; block after block goes from main memory into pieces, so that
            no accelerator ever holds the base as a whole.

    Raises:
        UserError: for settings that cannot work.
    """
    settings = _settings(config, speed)
    device, dtype = settings.model.torch_device(), TORCH_DTYPES[config.dtype]
    claim_device(device, world.size)
    if config.card_gib is not None:
        limit_memory(device, config.card_gib)
    logger.info("building the VAE and the identity embedder (%s size, random weights)", config.size)
    vae = build_vae(config.size, dtype, device)
    embedder = build_embedder(config.size, dtype, device)
    accelerate_decoder(vae, speed)
    logger.info("building the transformer in main memory")
    transformer = build_transformer(config.size, dtype)
    lora = settings.lora
    add_lora(transformer, rank=lora.lora_r, alpha=lora.lora_alpha, dropout=0.0, targets=None, seed=config.seed)
    denoiser = Denoiser(transformer)
    logger.info("placing the transformer on %s", device)
    if sharded:
        shard(transformer, world, device)
    acceleration = accelerate(transformer, speed, device)
    enable_context_parallel(transformer, world)
    height, width = clip_size(config.resolution, (1, 1), vae.spatial_compression_ratio)
    shape = (
        vae.config["latent_channels"],
        (config.frames - 1) // 4 + 1,
        height // vae.spatial_compression_ratio,
        width // vae.spatial_compression_ratio,
    )
    patch = transformer.config["patch_size"]
    require_divisible(
        heads=transformer.config["num_attention_heads"],
        tokens={f"{height}x{width} with {config.frames} frames": shape[1] * (shape[2] // patch) * (shape[3] // patch)},
        sp_size=world.sp_size,
        flag="--nproc_per_node",
    )
    sigmas = sampling_sigmas(settings.rollout.num_inference_steps, 5.0)
    teacher = acceleration.teacher(
        denoiser,
        lambda rollout: harvested_sigmas(settings.rollout, config.seed, rollout, sigmas),
        guidance_scale=settings.rollout.guidance_scale,
    )
    source = TeacherSource(
        _batches(config.batch_size, (height, width), world.dp_rank),
        start_batch=0,
        make_prompt=lambda name, generator: "x" * _length(config, generator),
        encoder=RandomConditions(config.size, shape, device, dtype),  # pyright: ignore[reportArgumentType]
        denoiser=teacher,
        config=settings.rollout,
        sigmas=sigmas,
        latent_shape=shape,
        accumulation=1,
        lookahead=1,
        seed=config.seed,
        device=device,
    )
    identity = IdentityTerm(
        settings.identity,
        vae,
        embedder,
        recompute=speed.id_decode_recompute,
        tile=speed.id_decode_tile,
        strips=Strips.of(world),
    )
    optimizer = LoraOptimizer(denoiser.lora_parameters(), settings.optimizer)
    student = acceleration.student(denoiser)
    return Setting(settings, device, denoiser, student, identity, optimizer, source, acceleration)


def _settings(config: BenchConfig, speed: SpeedConfig) -> TrainSettings:
    return TrainSettings(
        model=ModelConfig(pipeline_dir="random weights", dtype=config.dtype, device=config.device),
        data=DataConfig(wds_root=Path("random pictures"), metadata_key="name", batch_size=config.batch_size),
        prompts=PromptConfig(),
        rollout=RolloutConfig(
            train_target_resolution=config.resolution,
            train_video_length=config.frames,
            rollout_guidance_scale=config.rollout_guidance_scale,
            trajectory_reuse=config.trajectory_reuse,
            harvest_below=config.harvest_below,
            id_timestep_frac_low=config.id_timestep_frac,
            id_timestep_frac_high=config.id_timestep_frac,
            id_sigma_low=None,
            id_sigma_high=None,
        ),
        identity=IdentityConfig(
            dino_model_dir="random weights",
            dino_head_path="random weights",
            id_decode_downsample_mode=config.id_decode_downsample_mode,
            id_decode_scale=config.id_decode_scale,
        ),
        lora=LoraConfig(lora_r=config.lora_r, lora_alpha=config.lora_r),
        optimizer=OptimizerConfig(),
        validation=ValidationConfig(),
        run=RunConfig(seed=config.seed),
        distributed=DistributedConfig(),
        speed=speed,
    )


def _batches(size: int, pixels: tuple[int, int], place: int) -> Iterator[Batch]:
    """The same pictures for ever; `place` is that of the process among those with samples of their own."""
    generator = keyed_generator("pictures")
    images = torch.randint(0, 256, (size, 3, *pixels), generator=generator, dtype=torch.uint8)
    names = tuple(f"character {i}" for i in range(size))
    slots = tuple(range(place * size, (place + 1) * size))
    batch = Batch(images, images, torch.zeros(size, dtype=torch.bool), names, names, slots)
    return itertools.repeat(replace(batch))


def _length(config: BenchConfig, generator: torch.Generator) -> int:
    low, high = config.prompt_tokens - config.prompt_spread, config.prompt_tokens + config.prompt_spread
    return int(torch.randint(low, high + 1, (), generator=generator))
