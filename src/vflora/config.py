"""Settings of the training run: one frozen dataclass per concern, every default declared here and nowhere else.

Field names are the names of the flags. The string under a field is its help text and its entry in the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vflora.devices import torch_device
from vflora.errors import UserError
from vflora.profiling import parse_steps

Precision = Literal["bf16", "fp32"]
TORCH_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def require(condition: bool, sentence: str) -> None:
    """Raises UserError with `sentence` unless `condition` holds."""
    if not condition:
        raise UserError(sentence)


def require_frames(flag: str, frames: int) -> None:
    """Raises UserError unless `frames` is 4n+1, which the VAE's first frame plus groups of four ask for."""
    lower = max(1, (frames - 1) // 4 * 4 + 1)
    require(frames >= 1 and frames % 4 == 1, f"--{flag} {frames} is not of the form 4n+1: use {lower} or {lower + 4}.")


def require_guidance(scale: float | None) -> None:
    """Raises UserError if `scale`, of classifier-free guidance, would lead away from the prompt."""
    require(scale is None or scale >= 0, f"--guidance_scale {scale} must not be negative: 1 is no guidance.")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    pipeline_dir: str
    """Folder or hub name of the image-to-video pipeline."""
    transformer_version: str = "480p_i2v"
    """Which transformer of the original layout to load: 480p_i2v, 480p_i2v_distilled, 720p_i2v, ..."""
    dtype: Precision = "bf16"
    """Precision of the frozen weights; the LoRA always trains in fp32."""
    device: str = "auto"
    """Where to compute: auto takes the accelerator if there is one, else the CPU."""

    def torch_device(self) -> torch.device:
        """Returns the device that `device` stands for."""
        return torch_device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """Returns the precision of the frozen weights."""
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True)
class PromptConfig:
    """Where prompts come from: the data set holds none."""

    prompt_bank: Path | None = None
    """YAML file of templates; without it the bank of motions and cameras that ships with the package is used."""
    prompt_builder: Path | None = None
    """Python file with `build_prompt(character) -> str`, instead of a bank. The file is run: use only your own. It may
    draw from `random` and `numpy.random`, which are seeded for every prompt."""
    condition_cache: Path | None = None
    """Folder that keeps encoded prompts and images across runs; complete, it spares loading the text encoder."""
    condition_lookahead: int = 16
    """Batches whose prompts and images are encoded in one go, so that the text encoder visits the GPU rarely."""

    def __post_init__(self) -> None:
        require(
            not (self.prompt_bank and self.prompt_builder), "--prompt_bank and --prompt_builder exclude each other."
        )
        require(self.condition_lookahead >= 1, "--condition_lookahead must be at least 1.")


@dataclass(frozen=True)
class RolloutConfig:
    """Size of the clips, the teacher's rollout, and where it is harvested.

    Noise levels win over places here; only where flags are read does a place that is given set them to None.
    """

    train_target_resolution: str = "480p"
    """480p, 720p, or HEIGHTxWIDTH; the first two take the bucket of that size with the pictures' aspect ratio."""
    train_video_length: int = 17
    """Frames of a clip, 4n+1."""
    num_inference_steps: int = 25
    """Steps of the rollout's schedule."""
    harvest_count: int = 2
    """Distilled points per step above the deep one, where identity is judged."""
    harvest_below: int = 1
    """Distilled points per step below the deep one, where nothing else holds the student; rollouts go on to them. Fewer
    where the schedule ends before."""
    harvest_scheme: Literal["bracket", "random"] = "bracket"
    """bracket: near 50 % and 25 % of the schedule; random: anywhere above the deep point."""
    harvest_jitter_frac: float = 0.05
    """Jitter of bracketed points, as a fraction of the schedule."""
    id_timestep_frac_low: float = 0.6
    """Choose the deep point by its place instead of its noise level: the earliest place, a fraction of the schedule.
    Given as a flag or in a --config file, this or the next one sets --id_sigma_low and --id_sigma_high aside."""
    id_timestep_frac_high: float = 0.85
    """The latest place of the deep point."""
    id_sigma_low: float | None = 0.15
    """The lowest noise level of the deep point, where identity is judged; null: it is chosen by its place."""
    id_sigma_high: float | None = 0.45
    """The highest noise level of the deep point; null, with --id_sigma_low null: it is chosen by its place."""
    id_on_policy: float = 0.0
    """Share of steps whose deep point the student reaches by itself, from the last harvested point on."""
    rollout_guidance_scale: float | None = None
    """Classifier-free guidance along the rollout; 1 is none. By default the pipeline's own, 1 for distilled ones: what
    is harvested then lies where people will sample. The target stays the conditional prediction."""
    trajectory_reuse: int = 1
    """Optimizer steps that one rollout serves, with a fresh harvest each; the teacher is frozen, so it stays true."""

    def __post_init__(self) -> None:
        require_frames("train_video_length", self.train_video_length)
        require(self.num_inference_steps >= 2, "--num_inference_steps must be at least 2.")
        require(self.harvest_count >= 0, "--harvest_count must not be negative.")
        require(self.harvest_below >= 0, "--harvest_below must not be negative.")
        require(
            0 <= self.id_timestep_frac_low <= self.id_timestep_frac_high < 1,
            "--id_timestep_frac_low must not exceed --id_timestep_frac_high, and both lie in [0, 1).",
        )
        require(
            (self.id_sigma_low is None) == (self.id_sigma_high is None),
            "--id_sigma_low and --id_sigma_high belong together: set both to null or neither.",
        )
        require(
            self.id_sigma_low is None or 0 < self.id_sigma_low <= (self.id_sigma_high or 0.0) <= 1,
            "--id_sigma_low must not exceed --id_sigma_high, and both lie in (0, 1].",
        )
        require(0 <= self.id_on_policy <= 1, "--id_on_policy is a share: it lies in [0, 1].")
        require(
            self.id_on_policy == 0 or self.harvest_count > 0,
            "--id_on_policy starts from a harvested point: use --harvest_count 1 or more.",
        )
        require(0 <= self.harvest_jitter_frac <= 0.5, "--harvest_jitter_frac must lie in [0, 0.5].")
        require(
            self.rollout_guidance_scale is None or self.rollout_guidance_scale >= 1,
            "--rollout_guidance_scale must be at least 1 (1 is no guidance).",
        )
        require(self.trajectory_reuse >= 1, "--trajectory_reuse must be at least 1.")

    @staticmethod
    def sets_aside() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Returns flags and what any of them puts out of force, see `vflora.presets.set_aside`."""
        return [(("id_timestep_frac_low", "id_timestep_frac_high"), ("id_sigma_low", "id_sigma_high"))]

    @property
    def guidance_scale(self) -> float:
        """The guidance of rollouts, once `vflora.clips.as_sampled` has settled it.

        Raises:
            ValueError: before.
        """
        if self.rollout_guidance_scale is None:
            raise ValueError("how rollouts are guided is not settled: ask vflora.clips.as_sampled")
        return self.rollout_guidance_scale


@dataclass(frozen=True)
class IdentityConfig:
    """The identity loss."""

    dino_model_dir: str
    """Folder of the DINOv3 backbone."""
    dino_head_path: str
    """Projection head for it: the folder of `vflora train-head`, or a file (also a .pt of the reference code)."""
    id_num_frames: int = 5
    """Frames of the decoded estimate that are compared with the anchor."""
    lambda_distill: float = 1.0
    """Weight of the distillation loss; 0 leaves the identity loss alone, which shows what distillation is for."""
    lambda_id: float = 0.6
    """Weight of the identity loss."""
    lambda_id_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight rises to its value over the warm-up."""
    lambda_id_warmup_steps: int = 500
    """Optimizer steps of that warm-up; a constant weight has none."""
    id_every_steps: int = 1
    """Compute the identity loss every so many optimizer steps."""
    id_decode_downsample_mode: Literal["false", "area", "bicubic"] = "false"
    """Shrink the estimate's latents before decoding, to save time and memory; false decodes at full size."""
    id_decode_scale: float = 0.5
    """By which factor they shrink."""
    id_margin: float = 0.0
    """Hinge: frames whose cosine to the anchor is above 1 - margin press no further; 0 never lets go."""

    def __post_init__(self) -> None:
        require(self.id_num_frames >= 1, "--id_num_frames must be at least 1.")
        require(self.lambda_id >= 0, "--lambda_id must not be negative.")
        require(self.lambda_distill >= 0, "--lambda_distill must not be negative.")
        require(self.lambda_distill + self.lambda_id > 0, "--lambda_distill and --lambda_id must not both be 0.")
        require(self.lambda_id_warmup_steps >= 0, "--lambda_id_warmup_steps must not be negative.")
        require(self.id_every_steps >= 1, "--id_every_steps must be at least 1.")
        require(0 < self.id_decode_scale <= 1, "--id_decode_scale must lie in (0, 1].")
        require(0 <= self.id_margin < 2, "--id_margin must lie in [0, 2).")


@dataclass(frozen=True)
class LoraConfig:
    """What is trained."""

    use_lora: bool = True
    """This recipe trains a LoRA and nothing else; false is refused."""
    lora_r: int = 16
    """Rank of the LoRA."""
    lora_alpha: float = 16
    """Strength of the LoRA: its update is B A times alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout on the LoRA's input."""
    lora_target_modules: list[str] | None = None
    """Layers, by their names in the original code (img_attn_q) or in diffusers (attn.to_q)."""
    pretrained_lora_path: str | None = None
    """LoRA to start from."""

    def __post_init__(self) -> None:
        require(self.use_lora, "--use_lora false is refused: this recipe trains a LoRA only; drop the flag.")
        require(self.lora_r >= 1, "--lora_r must be at least 1.")
        require(0 <= self.lora_dropout < 1, "--lora_dropout must lie in [0, 1).")


@dataclass(frozen=True)
class OptimizerConfig:
    """How it is trained."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    use_muon: bool = True
    """Muon for matrices and AdamW for the rest; false is AdamW alone."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    warmup_steps: int = 500
    """Optimizer steps until the peak; then a cosine to zero."""
    max_train_steps: int = 10_000
    """Optimizer steps of the whole run."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step."""

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1.")
        for name in ("warmup_steps", "weight_decay"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative.")
        require(self.learning_rate > 0, "--learning_rate must be above 0.")
        require(self.max_grad_norm > 0, "--max_grad_norm must be above 0.")


@dataclass(frozen=True)
class ValidationConfig:
    """Student and teacher side by side on held-out pictures."""

    enable_validation: bool = False
    """Validate during training."""
    val_every_steps: int = 1000
    """Optimizer steps between validations."""
    val_num_samples: int = 4
    """Held-out pictures per validation."""
    val_video_length: int = 61
    """Frames of a validation clip, 4n+1."""

    def __post_init__(self) -> None:
        require_frames("val_video_length", self.val_video_length)
        require(self.val_every_steps >= 1, "--val_every_steps must be at least 1.")
        require(self.val_num_samples >= 1, "--val_num_samples must be at least 1.")


@dataclass(frozen=True)
class RunConfig:
    """Where the run writes, and how it goes on."""

    output_dir: Path = Path("./outputs")
    """Folder of checkpoints, metrics, previews and the resolved settings."""
    trajectory_dir: Path | None = None
    """Folder of teacher trajectories that `vflora rollouts` writes: train from them instead of asking the teacher."""
    save_every_steps: int = 1000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int | None = None
    """Keep only so many of the newest checkpoints; all by default."""
    log_every_steps: int = 10
    """Optimizer steps between lines of metrics."""
    logger: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl, which is always written."""
    seed: int = 42
    """Seed of everything random."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, `latest` for the newest one in --output_dir, or `auto`: the newest one if there is any."""
    async_save: bool = False
    """Write checkpoints in a thread while the training goes on."""
    profile_steps: str | None = None
    """Steps to record with PyTorch's profiler, like 5-7; their trace goes to traces/ in --output_dir."""
    teacher_check: int = 0
    """Every so many steps, assert that the teacher's prediction on a fixed input has not moved by a bit; 0 is never."""

    def __post_init__(self) -> None:
        for name in ("save_every_steps", "log_every_steps"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1.")
        require(self.keep_checkpoints is None or self.keep_checkpoints >= 1, "--keep_checkpoints must be at least 1.")
        if self.profile_steps is not None:
            parse_steps(self.profile_steps)
        require(self.teacher_check >= 0, "--teacher_check must not be negative.")


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes."""

    enable_fsdp: bool = True
    """Shard the frozen base over all processes; one process has nothing to shard, and --mode fast and low_memory choose
    false by themselves."""
    sp_size: int = 1
    """Processes that share one sample's tokens (sequence parallelism)."""

    def __post_init__(self) -> None:
        require(self.sp_size >= 1, "--sp_size must be at least 1.")


@dataclass(frozen=True)
class StorageConfig:
    """How trajectories are kept; a folder that was begun goes on as it was."""

    trajectory_dtype: Precision = "fp32"
    """fp32 keeps every bit; bf16 takes half the disk and rounds what the student sees and learns."""
    rollouts_per_shard: int = 64
    """Rollouts in one tar file, fewer where not every process would get one; a killed process loses at most these."""

    def __post_init__(self) -> None:
        require(self.rollouts_per_shard >= 1, "--rollouts_per_shard must be at least 1.")


@dataclass(frozen=True)
class AheadConfig:
    """For which training something is made ahead."""

    train_processes: int | None = None
    """Data-parallel processes that the training will have; by default as many as work ahead now."""

    def __post_init__(self) -> None:
        require(
            self.train_processes is None or self.train_processes >= 1, "--train_processes must be at least 1 if given."
        )
