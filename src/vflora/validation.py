"""Student and teacher side by side on held-out pictures: does identity hold, and does it still move?"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from torch import Tensor
from tqdm import tqdm

from vflora.data.images import to_signed
from vflora.data.schema import DataSet
from vflora.data.validation import ValidationLoader
from vflora.distributed.launch import is_first
from vflora.distributed.processes import ALONE, World
from vflora.errors import UserError
from vflora.evaluate import VideoScores, score_video, teacher_deviation
from vflora.flow import clean_estimate
from vflora.models.conditions import ConditionEncoder
from vflora.models.denoiser import Denoiser
from vflora.models.identity import IdentityEmbedder
from vflora.models.video_vae import decode_frames
from vflora.previews import PreviewSample, file_name, write_index, write_preview
from vflora.random_streams import keyed_generator, keyed_noise
from vflora.rollout import rollout
from vflora.settings import TrainSettings
from vflora.teacher_source import NO_PROMPT, PromptMaker
from vflora.types import Batch, Conditions, Trajectory

logger = logging.getLogger(__name__)

_DEVIATION_POINTS = 4
_TILE_PIXELS = 256
FROZEN_RATIO = 0.5
"""Below this share of the teacher's motion the student is called frozen."""


class Validator:
    """Samples held-out pictures twice from the same noise, once with the LoRA and once without."""

    def __init__(
        self,
        *,
        denoiser: Denoiser,
        vae: AutoencoderKLHunyuanVideo15,
        embedder: IdentityEmbedder,
        encoder: ConditionEncoder,
        make_prompt: PromptMaker,
        sigmas: Tensor,
        latent_shape: tuple[int, int, int, int],
        guidance_scale: float,
        seed: int,
        device: torch.device,
    ):
        """Takes the models and the size of a validation clip (C, T, H, W)."""
        self._denoiser, self._vae, self._embedder, self._encoder = denoiser, vae, embedder, encoder
        self._make_prompt, self._sigmas, self._latent_shape = make_prompt, sigmas, latent_shape
        self._guidance_scale, self._seed, self._device = guidance_scale, seed, device

    @torch.no_grad()
    def run(self, batches: Iterable[Batch], preview_dir: Path | None, world: World = ALONE) -> dict[str, float]:
        """Returns the metrics, averaged over the samples; previews show the teacher left, the student right.

        The processes share the samples; all of them call it and all get the same metrics.

        Args:
            batches: held-out pictures, the same on every process.
            preview_dir: folder for one mp4 per sample (see `vflora.previews`); None writes none.
            world: the processes.
        """
        samples = [(batch, index) for batch in batches for index in range(len(batch))]
        mine = range(world.dp_rank, len(samples), world.dp_size)
        rounds = -(-len(samples) // world.dp_size)
        # Who has a sample less repeats one, without a preview: a sharded model computes on all processes or on none.
        turns = [*mine, *[0] * (rounds - len(mine))]
        bar = tqdm(turns, desc="validation", unit="sample", leave=False, delay=2, disable=not is_first())
        own = [
            self._sample(*samples[number], preview_dir if turn < len(mine) and world.leads_sample else None)
            for turn, number in enumerate(bar)
        ]
        everyone = world.gather_over_data(own)
        rows = [everyone[number % world.dp_size][number // world.dp_size] for number in range(len(samples))]
        if preview_dir is not None and world.is_main:
            write_index(preview_dir, rows)
        metrics = {name: fmean(row.numbers[name] for row in rows) for name in rows[0].numbers}
        metrics["val/motion_ratio"] = metrics["val/student_motion"] / max(metrics["val/teacher_motion"], 1e-9)
        if metrics["val/motion_ratio"] < FROZEN_RATIO:
            logger.warning(
                "the student moves %.0f %% as much as the teacher: lower --lambda_id, or stop at an earlier checkpoint",
                100 * metrics["val/motion_ratio"],
            )
        return metrics

    def _sample(self, batch: Batch, index: int, preview_dir: Path | None) -> PreviewSample:
        key, character = batch.keys[index], batch.characters[index]
        images = batch.images[index : index + 1]
        prompt = held_out_prompt(self._make_prompt, self._seed, character, key)
        conditions = self._encoder.encode([prompt], images)
        unconditional = self._encoder.encode([NO_PROMPT], images) if self._guidance_scale != 1 else None
        noise = keyed_noise(self._latent_shape, self._seed, "validation noise", key)[None].to(self._device)

        student = self._rollout(noise, conditions, unconditional)
        with self._denoiser.teacher():
            teacher = self._rollout(noise, conditions, unconditional)
        videos = {"teacher": self._decode(teacher), "student": self._decode(student)}
        reference = to_signed(images[0].to(self._device))
        scores = {who: score_video(video, reference, self._embedder) for who, video in videos.items()}
        if preview_dir is not None:
            write_preview(preview_dir, file_name(key), images[0], **videos)
        numbers = {"val/teacher_deviation": self._deviation(teacher, conditions)} | {
            f"val/{who}_{name}": value for who, s in scores.items() for name, value in _flat(s).items()
        }
        return PreviewSample(file_name(key), character, prompt, numbers)

    def _rollout(self, noise: Tensor, conditions: Conditions, unconditional: Conditions | None) -> Trajectory:
        return rollout(
            self._denoiser,
            conditions,
            noise,
            self._sigmas,
            len(self._sigmas) - 1,
            guidance_scale=self._guidance_scale,
            unconditional=unconditional,
        )

    def _decode(self, trajectory: Trajectory) -> Tensor:
        """Returns the video [3, F, H, W] in [-1, 1] on the CPU."""
        last = trajectory.point(len(trajectory) - 1)
        clean = clean_estimate(last.latents, last.sigma, last.teacher_velocity)
        tile = _TILE_PIXELS if self._device.type == "cuda" else None
        return decode_frames(self._vae, clean, tile=tile)[0].clamp(-1, 1).cpu()

    def _deviation(self, teacher: Trajectory, conditions: Conditions) -> float:
        """Mean squared velocity error of the student on points of the teacher's way, evenly spread."""
        indices = torch.linspace(0, len(teacher) - 1, _DEVIATION_POINTS).round().long().unique().tolist()
        errors = []
        for point in map(teacher.point, indices):
            velocity = self._denoiser.velocity(point.latents, point.sigma, conditions, next_sigma=point.next_sigma)
            errors.append(teacher_deviation(velocity, point.teacher_velocity))
        return fmean(errors)


def held_out_batches(settings: TrainSettings) -> list[Batch]:
    """Returns the first pictures of the validation list, one per batch: validation clips may be long.

    Raises:
        UserError: if there are none.
    """
    dataset = DataSet.open(settings.data.wds_root, settings.data.metadata_key, "val")
    config = replace(settings.data, batch_size=1, num_workers=0)
    batches = list(ValidationLoader(dataset, config, seed=settings.run.seed, limit=settings.validation.val_num_samples))
    if not batches:
        raise UserError(f"{settings.data.wds_root} has no validation samples: pack with a larger --val_split.")
    return batches


def held_out_prompt(make_prompt: PromptMaker, seed: int, character: str, key: str) -> str:
    """Returns the prompt of a held-out picture: the same at every validation of a run."""
    return make_prompt(character, keyed_generator(seed, "validation prompt", key))


def _flat(scores: VideoScores) -> dict[str, float]:
    return {
        "cosine_mean": scores.identity.mean,
        "cosine_std": scores.identity.std,
        "cosine_last_quarter": scores.identity.last_quarter,
        "motion": scores.motion.frame_difference,
    }
