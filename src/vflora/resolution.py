"""Height and width of a training clip, and of its latents."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vflora.config import require
from vflora.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15

TARGET_SIZES = {"480p": 640, "720p": 960}
"""What the model calls these resolutions: the side of a square of as many pixels."""


def clip_size(target: str, image_size: tuple[int, int], divisor: int) -> tuple[int, int]:
    """Returns height and width in pixels.

    Args:
        target: 480p or 720p, for the pipeline's bucket with the pictures' aspect ratio, or HEIGHTxWIDTH.
        image_size: height and width of the pictures.
        divisor: pixels per token.

    Raises:
        UserError: if the target is none of these or does not divide.
    """
    if target in TARGET_SIZES:
        # Seconds, and whoever only reads the help of `vflora data pack` would wait for them.
        from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

        processor = HunyuanVideo15ImageProcessor(vae_scale_factor=divisor)
        height, width = image_size
        return processor.calculate_default_height_width(height, width, target_size=TARGET_SIZES[target])
    match = re.fullmatch(r"(\d+)x(\d+)", target)
    if match is None:
        raise UserError(f"--train_target_resolution {target} is unknown: use 480p, 720p or HEIGHTxWIDTH.")
    height, width = int(match[1]), int(match[2])
    nearest = "x".join(str(max(divisor, round(n / divisor) * divisor)) for n in (height, width))
    require(
        height > 0 and width > 0 and height % divisor == width % divisor == 0,
        f"--train_target_resolution {target} does not divide by {divisor}: use {nearest}.",
    )
    return height, width


def latent_shape(vae: AutoencoderKLHunyuanVideo15, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns C, T, H, W of a clip's latents, from its frames (4n+1) and its height and width in pixels."""
    space, time = vae.spatial_compression_ratio, vae.temporal_compression_ratio
    return vae.config["latent_channels"], (frames - 1) // time + 1, size[0] // space, size[1] // space
