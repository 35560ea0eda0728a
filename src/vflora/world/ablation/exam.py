"""The exam that every arm sits: held-out characters, paired noise, marks from the renderer's ground truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from torch import Tensor

from vflora.adapters import add_adapters
from vflora.models.denoiser import Denoiser
from vflora.random_streams import keyed_generator, keyed_noise
from vflora.world.ablation.lab import LabConfig
from vflora.world.base_training import draw_sigmas, flow_errors
from vflora.world.characters import Domain, Split
from vflora.world.gates import sample_videos, save_grid
from vflora.world.grader import load_grader
from vflora.world.grading import Grades, grade
from vflora.world.latent_pool import PromptBank, as_stored, encode_clips, encode_vision
from vflora.world.models import WorldSizes
from vflora.world.renderer import Clips, render
from vflora.world.retrieval import Lineup
from vflora.world.scenes import Scenes, sample_scenes
from vflora.world.scenes import prompts as prompts_of
from vflora.world.vae_training import make_fast

_SHOWN = 4
_SIGMAS_PER_CLIP = 4
_SIGMA_PARTS = 8


@dataclass(frozen=True)
class Marks:
    """What an arm achieved.

    Attributes:
        numbers: means over the clips, see `Grades.summary`, and `base_domain_loss`.
        retrieval_by_frame: share of clips whose frame is taken for the right character, [F].
        cosine_by_frame: of each frame to the right character's vector, mean over clips [F].
        base_domain_loss_by_sigma: `base_domain_loss` in eight parts, from the least noise to the most: where the
            model has forgotten.
    """

    numbers: dict[str, float]
    retrieval_by_frame: list[float]
    cosine_by_frame: list[float]
    base_domain_loss_by_sigma: list[float]


def examine(lab: LabConfig, adapter: Path | None, picture: Path, *, seed: int, own_domain: bool = False) -> Marks:
    """Lets a model animate first frames of characters that nobody has trained on, and marks the videos.

    Clips and noise depend on `seed` alone, so that arms of one seed are paired.

    Args:
        lab: what all arms share.
        adapter: LoRA file, or None for the base.
        picture: PNG to write: first frames and what became of them.
        seed: which exam.
        own_domain: also mark the model on the characters that the base was trained on.
    """
    device, sizes = lab.torch_device(), WorldSizes()
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(lab.world_folder)
    make_fast(pipeline.vae)
    pipeline.to(device)
    if adapter is not None:
        add_adapters(pipeline.transformer, [adapter], [1.0])
    scenes, clips = _clips(lab, "creatures", lab.split, seed)
    videos, grades = _grade(lab, pipeline, scenes, clips, seed)
    save_grid(picture, videos, clips=_SHOWN, every=4)
    own_losses = _base_domain_losses(lab, pipeline, sizes, seed)
    numbers = grades.summary() | {"base_domain_loss": own_losses.mean().item()}
    if own_domain:
        own = _grade(lab, pipeline, *_clips(lab, "geometric", "dev", seed), seed)[1]
        numbers |= {f"own_domain/{name}": value for name, value in own.summary().items()}
    retrieved = (grades.rank == 0).float().mean(0)
    by_sigma = [part.mean().item() for part in own_losses.tensor_split(_SIGMA_PARTS)]
    return Marks(numbers, retrieved.tolist(), grades.cosine.mean(0).tolist(), by_sigma)


def _clips(lab: LabConfig, domain: Domain, split: Split, seed: int) -> tuple[Scenes, Clips]:
    sizes = WorldSizes()
    generator = keyed_generator(seed, "exam", domain, split)
    scenes = sample_scenes(
        lab.exam_clips, domain=domain, split=split, generator=generator, frames=sizes.frames, posts=0.0
    )
    clips = render(scenes, size=sizes.frame_size, device=lab.torch_device())
    return scenes, Clips(as_stored(clips.video), clips.mask, clips.centers, clips.phases)


def _grade(
    lab: LabConfig, pipeline: HunyuanVideo15ImageToVideoPipeline, scenes: Scenes, clips: Clips, seed: int
) -> tuple[Tensor, Grades]:
    videos = sample_videos(
        pipeline, scenes, clips, steps=lab.sampling_steps, guidance_scale=WorldSizes().guidance_scale, seed=seed
    )
    grader = load_grader(lab.grader_file, device=lab.torch_device())
    lineup = Lineup.load(lab.lineup_file(scenes.domain), lab.torch_device())
    return videos, grade(videos, scenes, grader=grader, lineup=lineup)


@torch.no_grad()
def _base_domain_losses(
    lab: LabConfig, pipeline: HunyuanVideo15ImageToVideoPipeline, sizes: WorldSizes, seed: int
) -> Tensor:
    """Flow-matching losses on the base's own domain, by rising noise: what the LoRA has made the model forget."""
    scenes, clips = _clips(lab, "geometric", "dev", seed)
    device, denoiser = clips.video.device, Denoiser(pipeline.transformer)
    bank = PromptBank(pipeline, prompts_of(scenes), device)
    rows = torch.tensor([bank.index[text] for text in prompts_of(scenes)])
    losses, sigmas = [], []
    for part in torch.arange(len(scenes)).split(64):
        video = clips.video[part.to(device)]
        clean = encode_clips(pipeline.vae, video)
        conditions = bank.conditions(rows[part], encode_vision(pipeline.image_encoder, video[:, :, 0]), clean[:, :, :1])
        for draw in range(_SIGMAS_PER_CLIP):
            generator = keyed_generator(seed, "exam sigmas", int(part[0]), draw)
            sigma = draw_sigmas(len(part), sizes.shift, generator).to(device)
            noise = torch.stack([keyed_noise(clean.shape[1:], seed, "exam noise", int(i), draw) for i in part])
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses.append(flow_errors(denoiser, clean, conditions, sigma, noise.to(device)))
            sigmas.append(sigma)
    return torch.cat(losses)[torch.cat(sigmas).argsort()]
