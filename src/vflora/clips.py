"""What rollouts and training work with alike, besides the transformer: the clips, and what they are made under."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TypeVar

from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from torch import Tensor

from vflora.data.schema import DataSet
from vflora.flow import sampling_sigmas
from vflora.models.conditions import ConditionEncoder
from vflora.models.loading import load_guidance_scale, load_patch_size, load_shift, load_vae
from vflora.resolution import clip_size, latent_shape
from vflora.rollout import deep_indices
from vflora.settings import TrainSettings
from vflora.trajectories.folder import condition_folder

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=TrainSettings)


@dataclass(frozen=True)
class Clips:
    """The clips of a run.

    Attributes:
        sigmas: the schedule [S + 1], from 1 to 0.
        vae: of the pipeline, frozen and on the device.
        size: height and width, pixels.
        encoder: of prompts and pictures.
    """

    sigmas: Tensor
    vae: AutoencoderKLHunyuanVideo15
    size: tuple[int, int]
    encoder: ConditionEncoder

    @classmethod
    def load(cls, settings: TrainSettings, dataset: DataSet, *, keep_images_on_disk: bool = True) -> Clips:
        """Loads the VAE, and decides how large clips are.

        Args:
            settings: of the run.
            dataset: whose pictures say which aspect ratio is wanted.
            keep_images_on_disk: as for `ConditionEncoder`.

        Raises:
            UserError: for whatever is wrong with settings or models.
        """
        model = settings.model
        device, dtype = model.torch_device(), model.torch_dtype()
        sigmas = noise_levels(settings)
        logger.info("loading the VAE")
        vae = load_vae(model.pipeline_dir, dtype, device)
        divisor = vae.spatial_compression_ratio * load_patch_size(model.pipeline_dir, model.transformer_version)
        size = clip_size(settings.rollout.train_target_resolution, dataset.size, divisor)
        encoder = ConditionEncoder(
            model.pipeline_dir,
            vae,
            size=size,
            dtype=dtype,
            device=device,
            cache_folder=condition_folder(settings),
            keep_images_on_disk=keep_images_on_disk,
        )
        return cls(sigmas, vae, size, encoder)

    def latent_shape(self, frames: int) -> tuple[int, int, int, int]:
        """Returns C, T, H, W of the latents of so many frames (4n+1)."""
        return latent_shape(self.vae, frames, self.size)


def as_sampled(settings: Settings) -> Settings:
    """Returns settings whose rollouts are guided as the pipeline samples, unless a flag says otherwise.

    Raises:
        UserError: if the pipeline does not tell.
    """
    scale = settings.rollout.rollout_guidance_scale
    if scale is None:
        scale = load_guidance_scale(settings.model.pipeline_dir, settings.model.transformer_version)
        scale = max(1.0, scale)  # less than none would lead away from the prompt
    return replace(settings, rollout=replace(settings.rollout, rollout_guidance_scale=float(scale)))


def noise_levels(settings: TrainSettings) -> Tensor:
    """Returns the schedule [S + 1] of the pipeline, from 1 to 0, and warns of one without a proper deep point.

    Raises:
        UserError: if the pipeline is not there.
    """
    rollout = settings.rollout
    shift = load_shift(settings.model.pipeline_dir, settings.model.transformer_version)
    sigmas = sampling_sigmas(rollout.num_inference_steps, shift)
    low, high = rollout.id_sigma_low, rollout.id_sigma_high
    deep = sigmas[deep_indices(rollout, sigmas)[0]].item()
    if low is not None and high is not None and not low <= deep <= high:
        logger.warning(
            "no point of the schedule has a noise level between --id_sigma_low %g and --id_sigma_high %g: identity is "
            "judged at the nearest, %.2f, and more --num_inference_steps bring others",
            *(low, high, deep),
        )
    return sigmas
