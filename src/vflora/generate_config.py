"""Settings of `vflora generate`; names and defaults of the old command line are kept, and what is not there refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vflora.config import Precision, require, require_frames, require_guidance


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
    """The same; wins over --video_length."""
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
    """The mp4 to write; without it, outputs/ and a name made of prompt and seed, with a number where it is taken."""
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
    """Bring in one layer at a time instead of one model: least memory, slower."""
    overlap_group_offloading: bool = True
    """With --group_offloading, copy the next layer while the present one computes."""
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
    """First step that may reuse, counted on a schedule of --total_steps."""
    cache_end_step: int = 45
    """Last step that may reuse, counted the same way."""
    total_steps: int = 50
    """Length of the schedule that the two refer to; they scale with --num_inference_steps."""
    cache_step_interval: int = 4
    """Everything is computed anew every so many steps."""
    use_sageattn: bool = False
    """Use the SageAttention kernel, if that package is installed."""
    sage_blocks_range: str = "0-53"
    """Blocks that use it."""

    sr: bool = False
    """Refused: there is no super-resolution here."""
    save_pre_sr_video: bool = False
    """Refused, as --sr."""
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
        file = self.output_path
        require(
            file is None or file.suffix.lower() == ".mp4", f"--output_path {file} is no mp4: let its name end in .mp4."
        )
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


def default_output(config: GenerateConfig) -> Path:
    """Returns outputs/<first words of the prompt>-seed<seed>.mp4."""
    words = re.findall(r"[a-z0-9]+", config.prompt.lower())[:8]
    return Path("outputs") / f"{'-'.join(words) or 'video'}-seed{config.seed}.mp4"
