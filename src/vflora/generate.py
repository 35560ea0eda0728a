"""`vflora generate`: one video from the base model, from LoRA files, or from a training checkpoint."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from vflora import acceleration
from vflora.adapters import AdapterInfo, add_adapters, find_adapter
from vflora.atomic import require_space, require_writable
from vflora.config import require
from vflora.devices import torch_device
from vflora.distributed.launch import process_count
from vflora.distributed.lending import borrowed
from vflora.distributed.processes import World, joined
from vflora.file_names import first_free
from vflora.generate_config import GenerateConfig, default_output
from vflora.inference import load_for_sampling, open_image, write_settings
from vflora.sampling import Pipeline, default_guidance, default_steps, generate_video
from vflora.shared_sampling import quicken, require_shareable, share, video_tokens, work_for_the_first
from vflora.video_io import write_mp4

log = logging.getLogger(__name__)


def run(config: GenerateConfig) -> Path | None:
    """Generates one video and writes it, with its settings beside it; the processes of torchrun share the work.

    Returns:
        The mp4; None in the processes of a launcher other than the first.

    Raises:
        UserError: if a file is missing, does not fit, or a setting does not go with the model.
    """
    with joined(process_count(), torch_device(config.device)) as world:
        require_shareable(config, world)
        world.from_main(lambda: _look_for_files(config))
        if world.is_main:
            return _generate(config, world)
        work_for_the_first(config, world)
        return None


def _look_for_files(config: GenerateConfig) -> None:
    """Checks paths, since a wrong one should show before minutes of loading and sampling."""
    path = config.output_path
    require(path is None or not path.is_dir(), f"--output_path {path} is a folder: give the name of the mp4.")
    folder = (path or default_output(config)).parent
    require_space(require_writable(folder, "--output_path"), 64 << 20, "make room for the video.")
    if config.image_path is not None:
        open_image(config.image_path)
    for adapter in config.adapter_paths:
        find_adapter(adapter)


def _generate(config: GenerateConfig, world: World) -> Path:
    started = time.perf_counter()
    image = None if config.image_path is None else open_image(config.image_path)
    pipeline, adapters = world.everywhere(lambda: _load(config))
    steps = _steps(config, pipeline)
    guidance = _guidance(config, pipeline)
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
    # Named only now, and by the first process alone: what other runs have written meanwhile stays.
    path = write_mp4(config.output_path or first_free(default_output(config)), video, config.fps)
    if config.save_generation_config:
        facts = {
            "steps_taken": steps,
            "guidance_used": guidance,
            "height": video.shape[2],
            "width": video.shape[3],
            "adapters": [adapter.as_json() for adapter in adapters],
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_settings(path.with_suffix(".json"), config, facts)
    log.info("wrote %s", path)
    return path


def _load(config: GenerateConfig) -> tuple[Pipeline, tuple[AdapterInfo, ...]]:
    pipeline = load_for_sampling(
        config.model_path,
        config.version,
        config.dtype,
        torch_device(config.device),
        waits=bool(config.offloading or config.group_offloading),
        prompts=(config.prompt, config.negative_prompt),
        resolution=config.resolution,
    )
    adapters = add_adapters(
        pipeline.transformer,
        config.adapter_paths,
        config.lora_scale,
        rank=config.lora_r,
        alpha=config.lora_alpha,
        targets=config.lora_target_modules,
    )
    _accelerate(pipeline, config, _steps(config, pipeline))
    return pipeline, adapters


def _steps(config: GenerateConfig, pipeline: Pipeline) -> int:
    return config.num_inference_steps or (8 if config.enable_step_distill else default_steps(pipeline))


def _guidance(config: GenerateConfig, pipeline: Pipeline) -> float:
    if config.guidance_scale is not None:
        return config.guidance_scale
    return 1.0 if config.cfg_distilled or config.enable_step_distill else default_guidance(pipeline)


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
