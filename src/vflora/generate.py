"""`vflora generate`: one video from the base model, from LoRA files, or from a training checkpoint."""

from __future__ import annotations

import logging
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vflora import acceleration
from vflora.adapters import AdapterInfo, add_adapters, find_adapter
from vflora.atomic import require_space
from vflora.config import Precision, require, require_frames, require_guidance
from vflora.devices import torch_device
from vflora.distributed.lending import borrowed
from vflora.distributed.processes import World, joined
from vflora.errors import UserError
from vflora.inference import load_for_sampling, open_image, write_settings
from vflora.resolution import TARGET_SIZES
from vflora.run_folder import require_writable
from vflora.sampling import Pipeline, default_steps, generate_video, prepare_for_sampling
from vflora.shared_sampling import quicken, require_shareable, share, video_tokens, work_for_the_first
from vflora.video_io import write_mp4

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate, with which model, and how."""

    prompt: str
    """What happens in the video."""
    model_path: str
    """Folder or hub name of the pipeline."""
    resolution: Literal["480p", "720p"] | None = None
    """480p or 720p; must be what the transformer was trained for. Without it, the transformer decides."""
    transformer_version: str | None = None
    """Transformer of the original layout; without it, it follows from resolution, picture and distillation."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    image_path: Path | None = None
    """First frame, for image-to-video models: the video takes the nearest aspect ratio that the model knows."""
    aspect_ratio: str = "16:9"
    """Width to height, for text-to-video models."""
    video_length: int = 121
    """Frames, 4n+1."""
    num_frames: int | None = None
    """The same; wins over video_length."""
    num_inference_steps: int | None = None
    """Sampling steps; without it, 50, or 8 for step-distilled models."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 for none; without it, what the pipeline says (6, or 1 for distilled models)."""
    cfg_distilled: bool = False
    """The transformer has guidance built in: none is added."""
    enable_step_distill: bool = False
    """The transformer is step-distilled: few steps, no guidance."""
    seed: int = 123
    """Of the starting noise, which is drawn on the CPU and so the same on every device."""
    output_path: Path | None = None
    """The mp4 to write; without it, outputs/ and a name made of prompt and seed."""
    fps: int = 24
    """Frames per second."""
    save_generation_config: bool = True
    """Write all settings as JSON beside the video."""

    checkpoint_path: Path | None = None
    """A training checkpoint, whose adapter is used."""
    lora_path: list[str] | None = None
    """One or several LoRA files or folders, of diffusers, ComfyUI, kohya or the original code."""
    lora_scale: list[float] = field(default_factory=lambda: [0.5])
    """Strength: one for all LoRAs, or one for each."""
    use_lora: bool = False
    """Accepted for old command lines: an adapter that is named is used."""
    lora_r: int | None = None
    """Rank; read from the file, and only checked if given."""
    lora_alpha: float | None = None
    """Alpha; read from the file, and taken instead of the file's if given."""
    lora_dropout: float = 0.0
    """Accepted for old command lines: there is no dropout when generating."""
    lora_target_modules: list[str] | None = None
    """Use the adapter in these layers only; without it, in all it has."""

    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""
    dtype: Precision = "bf16"
    """Precision of the weights."""
    offloading: bool = True
    """Keep each model in main memory until it is its turn."""
    group_offloading: bool | None = None
    """Bring in one layer at a time: least memory, slower."""
    overlap_group_offloading: bool = True
    """With group_offloading, copy the next layer while the present one computes."""
    vae_tiling: bool = True
    """Decode videos larger than 256 x 256 in overlapping tiles."""
    enable_torch_compile: bool = False
    """Compile the transformer's blocks."""
    enable_cache: bool = False
    """Reuse attention between steps; needs --cache_type taylorcache."""
    cache_type: str = "deepcache"
    """Only taylorcache is available here."""
    no_cache_block_id: str = "53"
    """Blocks that always compute."""
    cache_start_step: int = 11
    """First step that may reuse, counted on a schedule of total_steps."""
    cache_end_step: int = 45
    """Last step that may reuse, counted the same way."""
    total_steps: int = 50
    """Length of the schedule that the two refer to; they scale with num_inference_steps."""
    cache_step_interval: int = 4
    """Everything is computed anew every so many steps."""
    use_sageattn: bool = False
    """Use the SageAttention kernel, if that package is installed."""
    sage_blocks_range: str = "0-53"
    """Blocks that use it."""

    sr: bool = False
    """Refused: there is no super-resolution here."""
    save_pre_sr_video: bool = False
    """Refused, as sr."""
    rewrite: bool = False
    """Refused: there is no prompt rewriting here."""
    sparse_attn: bool = False
    """Refused: there is no sparse attention here."""

    def __post_init__(self) -> None:
        require(bool(self.prompt.strip()), "--prompt is empty: say what happens in the video.")
        require_frames("video_length" if self.num_frames is None else "num_frames", self.frames)
        for name in ("num_inference_steps", "fps", "total_steps", "cache_step_interval"):
            require((value := getattr(self, name)) is None or value >= 1, f"--{name} must be at least 1.")
        require_guidance(self.guidance_scale)
        file = default_output(self) if self.output_path is None else self.output_path
        require(file.suffix.lower() == ".mp4", f"--output_path {file} is no mp4: let its name end in .mp4.")
        require(
            not (self.sr or self.save_pre_sr_video),
            "--sr and --save_pre_sr_video are not available: drop them, and upscale the mp4 with another tool.",
        )
        require(not self.rewrite, "--rewrite is not available: write the prompt as you want it and drop the flag.")
        require(not self.sparse_attn, "--sparse_attn is not available: drop the flag, or try --use_sageattn true.")
        require(
            not (self.checkpoint_path and self.lora_path),
            "--checkpoint_path and --lora_path exclude each other: name the checkpoint in --lora_path too.",
        )
        named = self.adapter_paths
        require(
            bool(named) or not self.use_lora,
            "--use_lora true needs an adapter: give --lora_path FILE or --checkpoint_path FOLDER.",
        )
        require(
            len(self.lora_scale) in (1, max(1, len(named))),
            f"--lora_scale has {len(self.lora_scale)} values for {len(named)} adapters: give one, or as many.",
        )
        require(
            re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.aspect_ratio) is not None,
            f"--aspect_ratio {self.aspect_ratio} is not like 16:9.",
        )

    @property
    def frames(self) -> int:
        """Number of frames, under either of its two names."""
        return self.video_length if self.num_frames is None else self.num_frames

    @property
    def adapter_paths(self) -> list[str]:
        """Everything that holds an adapter to use."""
        return [str(self.checkpoint_path)] if self.checkpoint_path else list(self.lora_path or [])

    @property
    def version(self) -> str:
        """The transformer's name in the original layout."""
        if self.transformer_version:
            return self.transformer_version
        kind = "_step_distilled" if self.enable_step_distill else "_distilled" if self.cfg_distilled else ""
        return f"{self.resolution or '480p'}_{'i2v' if self.image_path else 't2v'}{kind}"


def run(config: GenerateConfig) -> Path | None:
    """Generates one video and writes it, with its settings beside it; the processes of torchrun share the work.

    Returns:
        The mp4; None in the processes of a launcher other than the first.

    Raises:
        UserError: if a file is missing, does not fit, or a setting does not go with the model.
    """
    with joined(int(os.environ.get("WORLD_SIZE", "1")), torch_device(config.device)) as world:
        require_shareable(config, world)
        world.from_main(lambda: _look_for_files(config))
        if world.is_main:
            return _generate(config, world)
        work_for_the_first(config, world)
        return None


def _look_for_files(config: GenerateConfig) -> None:
    """Checks paths, since a wrong one should show before minutes of loading and sampling."""
    path = config.output_path or default_output(config)
    require(not path.is_dir(), f"--output_path {path} is a folder: give the name of the mp4.")
    require_space(require_writable(path.parent, "--output_path"), 64 << 20, "make room for the video.")
    if config.image_path is not None:
        open_image(config.image_path)
    for adapter in config.adapter_paths:
        find_adapter(adapter)


def _generate(config: GenerateConfig, world: World) -> Path:
    started = time.perf_counter()
    image = None if config.image_path is None else open_image(config.image_path)
    pipeline, adapters = world.everywhere(lambda: _load(config))
    steps = _steps(config, pipeline)
    guidance = config.guidance_scale
    if guidance is None and (config.cfg_distilled or config.enable_step_distill):
        guidance = 1.0
    width, height = (int(side) for side in config.aspect_ratio.split(":"))
    share(pipeline.transformer, lambda: video_tokens(pipeline, image, width / height, config.frames), world)
    pipeline.set_progress_bar_config(desc="sampling", unit="step")
    with borrowed(pipeline.transformer, world):
        video = generate_video(
            pipeline,
            image,
            config.prompt,
            seed=config.seed,
            frames=config.frames,
            steps=steps,
            guidance_scale=guidance,
            negative_prompt=config.negative_prompt,
            aspect=width / height,
        )
    path = write_mp4(config.output_path or default_output(config), video, config.fps)
    if config.save_generation_config:
        facts = {
            "steps_taken": steps,
            "guidance_used": pipeline.guider.guidance_scale,
            "height": video.shape[2],
            "width": video.shape[3],
            "adapters": [adapter.as_json() for adapter in adapters],
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_settings(path.with_suffix(".json"), config, facts)
    log.info("wrote %s", path)
    return path


def default_output(config: GenerateConfig) -> Path:
    """Returns outputs/<first words of the prompt>-seed<seed>.mp4."""
    words = re.findall(r"[a-z0-9]+", config.prompt.lower())[:8]
    return Path("outputs") / f"{'-'.join(words) or 'video'}-seed{config.seed}.mp4"


def _load(config: GenerateConfig) -> tuple[Pipeline, tuple[AdapterInfo, ...]]:
    device = torch_device(config.device)
    waits = device.type != "cpu" and (config.offloading or config.group_offloading)
    pipeline = load_for_sampling(config.model_path, config.version, config.dtype, "cpu" if waits else device)
    _check_resolution(pipeline, config.resolution)
    adapters = add_adapters(
        pipeline.transformer,
        config.adapter_paths,
        config.lora_scale,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        targets=config.lora_target_modules,
    )
    prepare_for_sampling(pipeline)
    _accelerate(pipeline, config, _steps(config, pipeline))
    return pipeline, adapters


def _steps(config: GenerateConfig, pipeline: Pipeline) -> int:
    return config.num_inference_steps or (8 if config.enable_step_distill else default_steps(pipeline))


def _check_resolution(pipeline: Pipeline, resolution: str | None) -> None:
    trained = {size: name for name, size in TARGET_SIZES.items()}.get(pipeline.target_size)
    if resolution is not None and trained is not None and resolution != trained:
        raise UserError(f"This transformer is made for {trained}: use --resolution {trained}, or load another one.")


def _accelerate(pipeline: Pipeline, config: GenerateConfig, steps: int) -> None:
    if config.enable_cache:
        acceleration.cache_steps(
            pipeline,
            kind=config.cache_type,
            skip_blocks=config.no_cache_block_id,
            start=config.cache_start_step,
            end=config.cache_end_step,
            total=config.total_steps,
            interval=config.cache_step_interval,
            steps=steps,
        )
    quicken(pipeline.transformer, config)
    acceleration.place(
        pipeline,
        torch_device(config.device),
        offloading=config.offloading,
        group_offloading=config.group_offloading,
        overlap=config.overlap_group_offloading,
        vae_tiling=config.vae_tiling,
    )
