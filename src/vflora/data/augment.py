"""What the identity head will meet later, done to still images while it is trained.

The identity loss shows the head one-step estimates of clean video, decoded by the VAE: soft, faintly noisy, with
the VAE's own texture. A head that only ever saw clean stills judges those badly. So training images are cropped,
sent through the VAE with disturbed latents, shrunk and enlarged, blurred, and given noise, each with a
probability of its own. Every image has its own random generator, so that a resumed or resharded run sees the
same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from torch import Generator, Tensor

from vflora.data.config import AugmentConfig
from vflora.data.images import to_signed
from vflora.errors import UserError
from vflora.model_check import check_weights
from vflora.models.loading import HUB_NAME
from vflora.models.original_layout import is_original_layout, load_original_vae
from vflora.models.video_vae import decode_frames, encode_first_frame

BLUR_SIGMA = (0.002, 0.012)
"""Standard deviation of the blur, as a fraction of the image's side: 0.4 to 2.7 pixels of 224."""
NOISE_STD = (0.01, 0.12)
"""Standard deviation of pixel noise, where the range of values is -1 to 1."""
DOWNSCALE = (0.25, 0.75)
"""How far an image is shrunk before it is enlarged again."""
LATENT_BLUR = (0.0, 0.8)
"""Share of the latents' fine detail that is averaged away: a one-step estimate is a mean over what may be there."""
LATENT_NOISE = (0.0, 0.3)
"""Standard deviation of noise on the latents, whose own is about one."""

_DRAWS = 16
_VAE_BATCH = 8


def for_validation(config: AugmentConfig, *, crop: bool, degrade: bool) -> AugmentConfig:
    """Returns settings that treat every image alike: cropped evenly if `crop`, degraded if `degrade`."""
    return replace(
        config,
        crop_ratio=config.crop_ratio if crop else 1.0,
        crop_jitter=0.0,
        augment_flip=0.0,
        augment_downscale=0.0,
        augment_vae=float(degrade),
        augment_blur=float(degrade),
        augment_noise=float(degrade),
    )


class VaeRoundTrip:
    """Encodes stills as one-frame videos, disturbs the latents, and decodes them."""

    def __init__(self, vae: AutoencoderKLHunyuanVideo15, side: int) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.side = side

    @classmethod
    def load(cls, folder: Path, side: int, device: torch.device, dtype: torch.dtype) -> Self:
        """Loads the VAE of a pipeline folder, of either layout, or a folder that is a diffusers VAE itself.

        Raises:
            UserError: if there is none, or only a part of it.
        """
        if is_original_layout(folder):
            return cls(load_original_vae(folder, dtype, device), side)
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise UserError(
                f"There is no VAE in {folder}: run `hf download {HUB_NAME} "
                f'--include "vae/*" --local-dir {folder}`, '
                "or leave --vae_dir and --pipeline_dir out to train without the round trip."
            )
        check_weights(folder, f'go on with `hf download {HUB_NAME} --include "vae/*"` into the folder it is in')
        vae = AutoencoderKLHunyuanVideo15.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return cls(vae.to(device), side)  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def __call__(self, images: Tensor, draws: Tensor, generators: Sequence[Generator]) -> Tensor:
        """Sends images through.

        Args:
            images: [N, 3, H, W] in [-1, 1].
            draws: uniform numbers [N, 2] that choose the strength of blur and noise in latent space.
            generators: one per image, for the noise.

        Returns:
            [N, 3, H', W'] in [-1, 1], fp32, with the short side near `side` and both sides multiples of the
            VAE's compression.
        """
        ratio = self.vae.config["spatial_compression_ratio"]
        short = min(images.shape[-2:])
        size = [max(1, round(edge * self.side / short / ratio)) * ratio for edge in images.shape[-2:]]
        sent = []
        for start in range(0, len(images), _VAE_BATCH):
            part = slice(start, start + _VAE_BATCH)
            latents = encode_first_frame(self.vae, _resize(images[part], (size[0], size[1])))
            blur, noise = (
                _between(bounds, draws[part, i]).to(latents).view(-1, 1, 1, 1, 1)
                for i, bounds in enumerate((LATENT_BLUR, LATENT_NOISE))
            )
            smooth = F.avg_pool2d(latents.squeeze(2), 3, stride=1, padding=1, count_include_pad=False).unsqueeze(2)
            white = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators[part]])
            disturbed = torch.lerp(latents, smooth, blur) + noise * white.to(latents)
            sent.append(decode_frames(self.vae, disturbed, [0]).squeeze(2).float().clamp(-1, 1))
        return torch.cat(sent)


def to_input(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns uint8 images [N, 3, H, W] as fp32 in [-1, 1] at the backbone's input size, otherwise unchanged."""
    return _resize(to_signed(images), size)


def augment(
    images: Tensor,
    generators: Sequence[Generator],
    config: AugmentConfig,
    size: tuple[int, int],
    round_trip: VaeRoundTrip | None = None,
) -> Tensor:
    """Crops and degrades images at random.

    Args:
        images: uint8 [N, 3, H, W].
        generators: one per image; what happens to an image depends on its generator alone.
        config: probabilities and the crop.
        size: height and width of the result: the backbone's input size, so that pixels are resampled only once.
        round_trip: the VAE, where there is one.

    Returns:
        [N, 3, *size], fp32 in [-1, 1], on the images' device.
    """
    draws = torch.stack([torch.rand(_DRAWS, generator=g) for g in generators])
    sent = torch.nonzero(draws[:, 0] < config.augment_vae).flatten().tolist() if round_trip else []
    originals = to_signed(images)
    returned = {}
    if round_trip is not None and sent:
        trip = round_trip(originals[sent], draws[sent, 1:3], [generators[i] for i in sent])
        returned = dict(zip(sent, trip, strict=True))
    rows = []
    for i, (draw, generator) in enumerate(zip(draws.tolist(), generators, strict=True)):
        image = _crop(returned.get(i, originals[i]), config, draw[3], draw[4])
        if draw[5] < config.augment_flip:
            image = image.flip(-1)
        rows.append(_degrade(_resize(image[None], size), draw[6:], config, generator))
    return torch.cat(rows)


def _degrade(image: Tensor, draw: list[float], config: AugmentConfig, generator: Generator) -> Tensor:
    """Shrinks, blurs and roughens one image [1, 3, H, W]; `draw` are uniform numbers."""
    size = (image.shape[-2], image.shape[-1])
    if draw[0] < config.augment_downscale:
        factor = _between(DOWNSCALE, draw[1])
        small = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
        image = _resize(_resize(image, small), size)
    if draw[2] < config.augment_blur:
        image = gaussian_blur(image, _between(BLUR_SIGMA, draw[3]) * max(size))
    if draw[4] < config.augment_noise:
        white = torch.randn(image.shape, generator=generator).to(image)
        image = image + _between(NOISE_STD, draw[5]) * white
    return image.clamp(-1, 1)


def _crop(image: Tensor, config: AugmentConfig, length: float, place: float) -> Tensor:
    """Cuts the long side of [3, H, W] to its part; without jitter evenly, with jitter at a random place."""
    part = min(1.0, config.crop_ratio + (2 * length - 1) * config.crop_jitter)
    axis = -2 if image.shape[-2] > image.shape[-1] else -1
    edge = image.shape[axis]
    kept = max(1, round(edge * part))
    start = round((edge - kept) * (place if config.crop_jitter else 0.5))
    return image.narrow(axis, start, kept)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blurs [N, 3, H, W] with a Gaussian of `sigma` pixels, borders reflected."""
    radius = min(max(1, math.ceil(3 * sigma)), min(image.shape[-2:]) - 1)
    taps = torch.arange(-radius, radius + 1, dtype=torch.float32, device=image.device)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, -1)
    padded = F.pad(image, (radius,) * 4, mode="reflect")
    across = F.conv2d(padded, kernel.unsqueeze(2), groups=image.shape[1])
    return F.conv2d(across, kernel.unsqueeze(3), groups=image.shape[1])


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def _between(bounds: tuple[float, float], share):
    """Returns the point at `share` of the way between two bounds; a float or a tensor."""
    return bounds[0] + (bounds[1] - bounds[0]) * share
