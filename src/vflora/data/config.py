"""Settings of the training data, and of what is done to pictures for the identity head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vflora.config import require
from vflora.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are drawn."""

    wds_root: Path
    """Data set folder that `vflora data pack` wrote, with data/ and manifest/ in it."""

    metadata_key: str
    """Field of each sample's JSON, and column of the manifests, that names the character."""

    wds_shuffle_buf: int = 128
    """Samples held in the shuffle buffer of each place in the batch; only their positions are held, no bytes."""

    batch_size: int = 1
    """Pictures per batch on each process."""

    num_workers: int = 4
    """Processes that decode pictures; 0 decodes in the training process. The number does not change the data."""

    p_secondary: float = 0.1
    """Chance that another picture of the same character, where one was seen lately, becomes the identity anchor."""

    secondary_cache_max_size: int = 128
    """Characters whose latest pictures are remembered for that; with more characters than this, raise it."""

    enable_augmentation: bool = False
    """Whether reference pictures are cropped a little along their long side."""

    augment_r: float = 0.92
    """Part of the long side that the crop keeps, on average."""

    augment_j: float = 0.04
    """How far that part wanders to either side, uniformly."""

    max_bad_samples: int = 16
    """Damaged or oversized pictures that are skipped and named before the run stops."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: with the flag to change.
        """
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size} is no batch: use 1 or more.")
        for name in ("wds_shuffle_buf", "num_workers", "secondary_cache_max_size", "max_bad_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} is negative: use 0 or more.")
        _require_probability(self, "p_secondary")
        _require_crop(self, ratio="augment_r", jitter="augment_j")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are changed."""

    crop_ratio: float = 0.9
    """Part of the long side that a crop keeps, on average; 1 with --crop_jitter 0 keeps everything."""

    crop_jitter: float = 0.06
    """How far that part wanders to either side, uniformly."""

    augment_flip: float = 0.0
    """Chance of a mirrored image; keep 0 where left and right tell characters apart."""

    augment_vae: float = 0.3
    """Chance of a trip through the video VAE with disturbed latents, where --vae_dir or --pipeline_dir is given."""

    augment_vae_side: int = 256
    """Short side of the image on that trip, in pixels: about what the identity loss decodes at half size."""

    augment_downscale: float = 0.3
    """Chance of shrinking and enlarging."""

    augment_blur: float = 0.3
    """Chance of a Gaussian blur."""

    augment_noise: float = 0.3
    """Chance of pixel noise."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: with the flag to change.
        """
        _require_crop(self, ratio="crop_ratio", jitter="crop_jitter")
        for name in ("flip", "vae", "downscale", "blur", "noise"):
            _require_probability(self, f"augment_{name}")
        require(self.augment_vae_side >= 16, "--augment_vae_side must be at least 16 pixels.")


def _require_probability(config: object, name: str) -> None:
    chance = getattr(config, name)
    require(0 <= chance <= 1, f"--{name} {chance} is no probability: use a number from 0 to 1.")


def _require_crop(config: object, *, ratio: str, jitter: str) -> None:
    """Refuses crops that could keep nothing, or more than there is."""
    part, wander = getattr(config, ratio), getattr(config, jitter)
    require(
        wander >= 0 and 0 < part - wander <= part <= 1,
        f"--{ratio} {part} with --{jitter} {wander} leaves no crop: keep 0 <= {jitter} < {ratio} <= 1.",
    )
