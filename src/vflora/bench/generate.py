"""`vflora bench generate`: seconds and memory of a video, on random weights of the real or a small size.

The text encoders are left out: `vflora generate` encodes its prompts first and lets them go before the transformer
comes. Everything else is there and placed as it places it.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video import (
    HunyuanVideo15ImageToVideoPipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tqdm import tqdm
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from vflora import acceleration
from vflora.bench.models import build_transformer, build_vae
from vflora.bench.step import device_name
from vflora.config import TORCH_DTYPES, Precision, require, require_frames, require_guidance
from vflora.devices import limit_memory, share_of_memory, torch_device
from vflora.distributed.processes import claim_device
from vflora.models.random_weights import small_pipeline
from vflora.random_streams import keyed_generator
from vflora.resolution import TARGET_SIZES
from vflora.sampling import prepare_for_sampling

logger = logging.getLogger(__name__)

Mode = Literal["resident", "offload", "least_memory"]
_FLAGS: dict[Mode, str] = {
    "resident": "--offloading false",
    "offload": "",
    "least_memory": "--group_offloading true",
}
"""What each mode is called on the command line of `vflora generate`."""


@dataclass(frozen=True)
class BenchGenerateConfig:
    """What is measured."""

    mode: Mode = "offload"
    """resident: all on the GPU; offload: a model at a time, the default of `vflora generate`; least_memory: a layer."""
    size: Literal["real", "small"] = "real"
    """real: the true sizes (8.33 B transformer, 1.26 B VAE); small: seconds on a CPU."""
    resolution: Literal["480p", "720p"] = "480p"
    """480p is 480x848, 720p is 720x1280; of the small size both are what its model knows."""
    frames: int = 121
    """Frames of the video, 4n+1."""
    steps: int = 3
    """Sampling steps that are taken; the first warms up, the median of the others counts, and with --enable_cache their
    mean, as one in four is dear: take 9 then, or 13."""
    guidance_scale: float = 6.0
    """Classifier-free guidance; above 1 the transformer runs twice a step."""
    vae_tiling: bool = True
    """Decode in overlapping tiles of 256 x 256."""
    enable_cache: bool = False
    """Reuse attention between steps, as `vflora generate --enable_cache true --cache_type taylorcache`."""
    prompt_tokens: int = 100
    """Tokens of the prompt."""
    dtype: Precision = "bf16"
    """Precision of the weights."""
    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""
    card_gib: float | None = None
    """Let PyTorch have so much of the GPU's memory and no more, to see what a smaller card does."""
    output: Path | None = None
    """JSON file for all numbers."""

    def __post_init__(self) -> None:
        require_frames("frames", self.frames)
        require_guidance(self.guidance_scale)
        require(self.steps >= 2, "--steps must be at least 2: the first only warms up.")
        require(self.prompt_tokens >= 1, "--prompt_tokens must be at least 1.")


def run(config: BenchGenerateConfig) -> dict[str, Any]:
    """Measures, prints and returns; writes JSON if asked to.

    Raises:
        UserError: for settings that cannot work.
    """
    device = torch_device(config.device)
    claim_device(device, 1)
    if config.card_gib is not None:
        share_of_memory(device, config.card_gib)  # refused now, and not when the models are built
    logger.info("building a pipeline of random weights (%s size)", config.size)
    pipeline = build_pipeline(config, device)
    if config.card_gib is not None:  # random numbers are quickest drawn where there is room
        limit_memory(device, config.card_gib)
    prepare_for_sampling(pipeline)
    if config.enable_cache:
        acceleration.cache_steps(
            pipeline, kind=acceleration.SUPPORTED_CACHE, skip_blocks="", start=0, end=config.steps,
            total=config.steps, interval=4, steps=config.steps,
        )  # fmt: skip
    acceleration.place(
        pipeline,
        device,
        offloading=config.mode != "resident",
        group_offloading=config.mode == "least_memory",
        overlap=True,
        vae_tiling=config.vae_tiling,
    )
    measured = _measure(pipeline, config, device)
    settings = {name: str(value) if name == "output" else value for name, value in asdict(config).items()}
    flags = {"vflora generate": _FLAGS[config.mode]}
    facts = {"device": device_name(device), "torch": torch.__version__, "flags": flags}
    result = facts | {"bench": settings} | measured
    tqdm.write(line(result))
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(result, indent=1))
    return result


def build_pipeline(config: BenchGenerateConfig, device: torch.device) -> HunyuanVideo15ImageToVideoPipeline:
    """Builds what `vflora generate` would have loaded, in main memory, with random weights and no text encoders."""
    dtype = TORCH_DTYPES[config.dtype]
    if config.size == "small":
        pipeline = small_pipeline().to(dtype)
        pipeline.text_encoder = pipeline.text_encoder_2 = None
        return pipeline
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )
    with device:
        image_encoder = SiglipVisionModel(vision)
    transformer = build_transformer("real", dtype)
    transformer.register_to_config(target_size=TARGET_SIZES[config.resolution], task_type="i2v")
    return HunyuanVideo15ImageToVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=build_vae("real", dtype, device).to("cpu"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=config.guidance_scale),
        image_encoder=image_encoder.to("cpu", dtype).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 384, "width": 384}),
    )


def _measure(
    pipeline: HunyuanVideo15ImageToVideoPipeline, config: BenchGenerateConfig, device: torch.device
) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    marks: list[float] = []

    def mark(*_: Any) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        marks.append(time.perf_counter())

    pipeline.guider = pipeline.guider.new(guidance_scale=config.guidance_scale)
    handle = pipeline.transformer.register_forward_hook(mark)
    height, width = (480, 848) if config.resolution == "480p" else (720, 1280)
    pipeline.set_progress_bar_config(desc="sampling", unit="step")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    mark()
    with torch.no_grad():
        frames = pipeline(
            image=Image.new("RGB", (width, height), (90, 120, 60)),
            num_frames=config.frames,
            num_inference_steps=config.steps,
            sigmas=torch.linspace(1.0, 0.0, config.steps + 1, dtype=torch.float64)[:-1].tolist(),
            generator=keyed_generator("video"),
            output_type="pt",
            **_embeddings(pipeline, config),
        ).frames[0]  # pyright: ignore[reportAttributeAccessIssue]
    mark()
    handle.remove()
    began, *passes, ended = marks
    per_step = 2 if config.guidance_scale > 1 else 1
    ends = passes[per_step - 1 :: per_step]
    steps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    step_s, decode_s = (fmean if config.enable_cache else median)(steps), ended - passes[-1]
    return {
        "height": frames.shape[2],
        "width": frames.shape[3],
        "frames": len(frames),
        "step_s": step_s,
        "steps_s": steps,
        "before_and_first_step_s": ends[0] - began,
        "decode_s": decode_s,
        "video_of_50_steps_s": 50 * step_s + decode_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_cuda else None,
    }


def _embeddings(pipeline: HunyuanVideo15ImageToVideoPipeline, config: BenchGenerateConfig) -> dict[str, torch.Tensor]:
    """Random prompts as the text encoders would have left them; the second text is empty."""
    settings, dtype = pipeline.transformer.config, pipeline.transformer.dtype
    device = pipeline._execution_device
    values = {}
    for kind in ("", "negative_"):
        drawn = torch.randn(1, config.prompt_tokens, settings.text_embed_dim, generator=keyed_generator(kind))
        values[f"{kind}prompt_embeds"] = drawn.to(device, dtype)
        values[f"{kind}prompt_embeds_mask"] = torch.ones(1, config.prompt_tokens, device=device)
        values[f"{kind}prompt_embeds_2"] = torch.zeros(1, 8, settings.text_embed_2_dim, device=device, dtype=dtype)
        values[f"{kind}prompt_embeds_mask_2"] = torch.zeros(1, 8, device=device)
    return values


def line(result: dict[str, Any]) -> str:
    """Says the numbers in one line."""
    peak = "" if result["peak_gib"] is None else f", peak {result['peak_gib']:.1f} GiB"
    return (
        f"{result['bench']['mode']}: {result['frames']} frames of {result['height']}x{result['width']}: "
        f"{result['step_s']:.2f} s a step, {result['decode_s']:.1f} s to decode, "
        f"{result['video_of_50_steps_s']:.0f} s for 50 steps{peak}"
    )
