"""Settings of `vflora train-head`; names and defaults are the reference's, plus a few of our own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from vflora.config import require
from vflora.data.config import AugmentConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FREE_TO_CHANGE = {
    "model_dir",
    "wds_root",
    "output_dir",
    "train_manifest",
    "val_manifest",
    "train_shards",
    "val_shards",
    "shuffle_buffer",
    "num_workers",
    "max_bad_samples",
    "val_batches",
    "val_every",
    "val_crop",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "logger",
    "resume_from_checkpoint",
    "deterministic",
    "device",
    "vae_dir",
    "pipeline_dir",
}


@dataclass(frozen=True, kw_only=True)
class HeadConfig(AugmentConfig):
    """Training of the identity projection head."""

    model_dir: Path
    """Folder of the DINOv3 backbone, ViT or ConvNeXt, in the transformers layout."""

    wds_root: Path
    """Data set folder that `vflora data pack` wrote, with data/ and manifest/ in it."""

    output_dir: Path
    """Folder of the heads, checkpoints, metrics and pictures."""

    id_key: str
    """Field of each sample's JSON, and column of the manifests, that holds the integer identity: identity_id."""

    train_manifest: Path = Path("manifest/train_manifest.csv")
    """Manifest of the training split, relative to --wds_root."""

    val_manifest: Path = Path("manifest/val_manifest.csv")
    """Manifest of the validation split, relative to --wds_root."""

    train_shards: str = "train-*.tar"
    """Pattern of the training shards under data/train."""

    val_shards: str = "val-*.tar"
    """Pattern of the validation shards under data/val."""

    shuffle_buffer: int = 4096
    """Accepted for the reference's sake: batches are drawn from the index of all samples, not from a buffer."""

    pk_identities: int = 16
    """P: identities in a batch, on each process."""

    pk_instances: int = 4
    """K: pictures of each of them."""

    max_per_identity: int = 16
    """Pictures of one identity that an epoch walks through."""

    total_steps: int = 10_000
    """Optimizer steps of the whole run."""

    grad_accum: int = 1
    """Batches per optimizer step; pictures of different batches are never contrasted."""

    learning_rate: float = 5e-4
    """Peak learning rate of AdamW."""

    weight_decay: float = 0.01
    """Decoupled weight decay."""

    warmup_ratio: float = 0.05
    """Part of the steps over which the learning rate rises; then a cosine to zero."""

    temperature: float = 0.1
    """Temperature of the contrastive loss."""

    dropout: float = 0.1
    """Dropout between the head's layers."""

    activation: Literal["gelu", "relu"] = "gelu"
    """Between the head's layers."""

    use_layernorm: bool = True
    """LayerNorm after each hidden layer."""

    no_layernorm: bool = False
    """The same as --use_layernorm false."""

    proj_dims: list[int] = field(default_factory=lambda: [512, 256])
    """Width of each of the head's layers; the last is the embedding's."""

    val_batches: int = 4
    """Validation uses about as many pictures as so many batches hold."""

    val_every: int = 1000
    """Steps between validations; 0 never validates, and the last head counts as the best."""

    val_crop: bool = False
    """Crop validation pictures evenly by --crop_ratio."""

    log_every: int = 25
    """Steps between lines of metrics."""

    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""

    keep_checkpoints: int | None = None
    """Keep only so many of the newest checkpoints; all by default."""

    seed: int = 1337
    """Of everything random."""

    model_dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the frozen backbone; the head trains in fp32."""

    device: str = "auto"
    """Where to train: auto takes the accelerator if there is one, else the CPU."""

    vae_dir: Path | None = None
    """Folder of the video VAE, for augmentation by a round trip through it."""

    pipeline_dir: Path | None = None
    """Pipeline folder whose VAE serves for that, instead of --vae_dir."""

    num_workers: int = 4
    """Processes that decode pictures; 0 decodes in the training process."""

    max_bad_samples: int = 16
    """Damaged or oversized pictures that are skipped and named before the run stops."""

    logger: Literal["tensorboard", "none"] = "tensorboard"
    """Where metrics go besides metrics.jsonl, which is always written."""

    resume_from_checkpoint: str | None = None
    """A checkpoint folder, `latest` for the newest one in --output_dir, or `auto`: the newest one if there is any."""

    deterministic: bool = True
    """On a GPU, add up gradients in the same order every time: a run that is resumed or repeated on one machine has
    the same losses to the last bit."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: with the flag to change.
        """
        super().__post_init__()
        for name in ("total_steps", "grad_accum", "log_every", "save_every", "val_batches", "keep_checkpoints"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} {value} must be at least 1.")
        for name in ("val_every", "num_workers", "max_bad_samples", "weight_decay", "shuffle_buffer"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)} must not be negative.")
        require(self.pk_identities >= 2, f"--pk_identities {self.pk_identities} leaves no contrast: use 2 or more.")
        require(self.pk_instances >= 2, f"--pk_instances {self.pk_instances} leaves no pairs: use 2 or more.")
        for name in ("learning_rate", "temperature"):
            require(getattr(self, name) > 0, f"--{name} {getattr(self, name)} must be above 0.")
        require(0 <= self.warmup_ratio <= 1, f"--warmup_ratio {self.warmup_ratio} must lie in [0, 1].")
        require(not (self.vae_dir and self.pipeline_dir), "--vae_dir and --pipeline_dir name the same VAE: pass one.")

    @property
    def layernorm(self) -> bool:
        """Whether hidden layers are normalised, from the two flags about it."""
        return self.use_layernorm and not self.no_layernorm

    @property
    def torch_dtype(self) -> torch.dtype:
        """Precision of the backbone."""
        return _DTYPES[self.model_dtype]

    @property
    def vae_folder(self) -> Path | None:
        """Where to look for the VAE, if anywhere."""
        return self.vae_dir or self.pipeline_dir

    def recipe(self) -> dict[str, Any]:
        """Returns the settings that decide the numbers of a run, as plain values: a resumed run needs the same."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE_TO_CHANGE}
        return values | {"vae_round_trip": self.vae_folder is not None and self.augment_vae > 0}
