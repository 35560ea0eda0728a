"""Settings of `vflora compare`, and the command line that they are."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from vflora.config import Precision, require, require_frames, require_guidance


@dataclass(frozen=True)
class CompareConfig:
    """Which LoRA, which pictures, and what the page should say."""

    pipeline_dir: str
    """Folder or hub name of the image-to-video pipeline."""
    lora_path: list[str]
    """LoRA file, folder, or training checkpoint; several act together."""
    images: list[Path]
    """Pictures, or folders of them; the name of a file, or of the folder it is in below, names the character."""
    output_dir: Path
    """Folder for page, videos, numbers, model card and adapter, ready to upload."""
    lora_scales: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7, 1.0])
    """Scales to show beside the base model."""
    prompts: list[str] | None = None
    """One for all pictures or one for each; {character} is replaced. Without it, they are drawn from a bank."""
    prompt_bank: Path | None = None
    """The bank to draw from; without it, the one that ships with the package."""
    seeds: list[int] = field(default_factory=lambda: [123])
    """Every picture is shown once with each seed."""
    max_rows: int = 12
    """Pictures times seeds beyond this many are left out."""
    transformer_version: str = "480p_i2v"
    """Transformer of the original layout."""
    video_length: int = 61
    """Frames, 4n+1."""
    num_inference_steps: int | None = None
    """Sampling steps; without it, 50, or 8 for step-distilled models."""
    guidance_scale: float | None = None
    """Classifier-free guidance, 1 for none; without it, what the pipeline says."""
    fps: int = 24
    """Frames per second."""
    judge_model_dir: Path | None = None
    """Vision model that grades identity, not used in training (DINOv2); without it, the pipeline's SigLIP."""
    dino_model_dir: Path | None = None
    """Backbone of the identity loss, to grade with it as well; its numbers flatter."""
    dino_head_path: Path | None = None
    """Its projection head."""
    base_model: str | None = None
    """Hub name of the base model, for the model card; without it, pipeline_dir where that is one."""
    title: str | None = None
    """Of the page; without it, the name of the LoRA."""
    notice: str | None = None
    """A sentence that stands plainly at the top of page and card."""
    max_page_mb: float = 25.0
    """Size of the page at most; its videos are encoded to fit, those in the folder keep their quality."""
    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""
    dtype: Precision = "bf16"
    """Precision of the weights."""
    offloading: bool = True
    """Keep each model in main memory until it is its turn."""
    group_offloading: bool = False
    """Bring in one layer at a time instead of one model: least memory, slower."""
    vae_tiling: bool = True
    """Decode videos larger than 256 x 256 in overlapping tiles."""

    def __post_init__(self) -> None:
        require_frames("video_length", self.video_length)
        require_guidance(self.guidance_scale)
        require(bool(self.lora_path), "--lora_path is empty: name the LoRA to compare with its base.")
        require(bool(self.seeds), "--seeds is empty: give at least one number.")
        for name in ("max_rows", "num_inference_steps", "fps"):
            require((value := getattr(self, name)) is None or value >= 1, f"--{name} must be at least 1.")
        require(self.max_page_mb > 0, "--max_page_mb must be above 0.")
        require(
            bool(self.lora_scales)
            and min(self.lora_scales) > 0
            and len(set(self.lora_scales)) == len(self.lora_scales),
            "--lora_scales must be different positive numbers, such as 0.3 0.5 0.7 1.0; the base is always shown.",
        )
        require(
            (self.dino_model_dir is None) == (self.dino_head_path is None),
            "--dino_model_dir and --dino_head_path go together: give both or neither.",
        )


def command_of(config: CompareConfig) -> str:
    """Returns the command that makes this page again, without settings left at their defaults."""
    plain = CompareConfig(config.pipeline_dir, config.lora_path, config.images, config.output_dir)
    parts = ["vflora compare"]
    for name, value in vars(config).items():
        if value == getattr(plain, name) and name not in ("pipeline_dir", "lora_path", "images", "output_dir"):
            continue
        values = value if isinstance(value, list) else [value]
        parts.append(f"--{name} " + " ".join(shlex.quote(str(v)) for v in values))
    return " \\\n  ".join(parts)
