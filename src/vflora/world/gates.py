"""What the world's models must pass before anything is built on them, in numbers and in pictures.

The bounds were written down before the first run: the VAE shows every frame at 28 dB or more, and the base model
moves in the direction that the prompt names in at least 90 of 100 clips of its own domain.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline
from PIL import Image
from torch import Tensor

from vflora.flow import euler_step, sampling_sigmas
from vflora.models.denoiser import Denoiser
from vflora.random_streams import keyed_generator, keyed_noise
from vflora.world.backgrounds import draw_backgrounds
from vflora.world.characters import Domain, Split
from vflora.world.latent_pool import PromptBank, as_stored, encode_clips, encode_vision
from vflora.world.renderer import Clips, render
from vflora.world.scenes import DIRECTIONS, MOTIONS, SPEEDS, Scenes, paths, sample_scenes
from vflora.world.scenes import prompts as prompts_of

MIN_PSNR_DB = 28.0
MIN_DIRECTION_ACCURACY = 0.9
_AT_ONCE = 64


@dataclass(frozen=True)
class VaeGate:
    """How well the VAE shows clips of one domain.

    Attributes:
        domain: of the clips.
        psnr_by_frame: in dB, over all pixels.
        body_psnr_by_frame: over the character's pixels only.
    """

    domain: str
    psnr_by_frame: tuple[float, ...]
    body_psnr_by_frame: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether every frame reaches the bound."""
        return min(self.psnr_by_frame) >= MIN_PSNR_DB

    def summary(self) -> dict:
        """Returns the gate as plain data."""
        worst = {"min_psnr": min(self.psnr_by_frame), "min_body_psnr": min(self.body_psnr_by_frame)}
        return {**asdict(self), **worst, "passed": self.passed}


@dataclass(frozen=True)
class MotionGate:
    """How often the generated motion is the one in the prompt, found by comparing with all paths there are.

    Attributes:
        domain: of the clips.
        direction: share of clips that move in the prompt's direction.
        motion: share with the prompt's kind of motion.
        speed: share with the prompt's speed.
        path_error: median distance between generated and true position, in pixels, over clips and frames.
    """

    domain: str
    direction: float
    motion: float
    speed: float
    path_error: float

    @property
    def passed(self) -> bool:
        """Whether the direction is right often enough."""
        return self.direction >= MIN_DIRECTION_ACCURACY

    def summary(self) -> dict:
        """Returns the gate as plain data."""
        return {**asdict(self), "passed": self.passed}


def gate_clips(
    count: int, *, domain: Domain, split: Split, frames: int, size: int, device: torch.device, posts: float = 0.15
) -> tuple[Scenes, Clips]:
    """Renders the clips that a gate looks at, always the same ones; values are rounded as pictures are."""
    generator = keyed_generator("gate", domain, split)
    scenes = sample_scenes(count, domain=domain, split=split, generator=generator, frames=frames, posts=posts)
    clips = render(scenes, size=size, device=device)
    return scenes, Clips(as_stored(clips.video), clips.mask, clips.centers, clips.phases)


def psnr_by_frame(video: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each frame index over a batch of clips.

    Args:
        video: [B, 3, F, H, W] in [-1, 1]; values outside are clamped.
        reference: same shape.
        mask: [B, F, H, W], weight of each pixel; None for all alike.

    Returns:
        dB, [F].
    """
    squared = (video.clamp(-1, 1) - reference).square().mean(1)
    weight = torch.ones_like(squared) if mask is None else mask
    error = (squared * weight).sum((0, 2, 3)) / weight.sum((0, 2, 3))
    return 10 * torch.log10(4 / error)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLHunyuanVideo15, video: Tensor) -> Tensor:
    """Encodes and decodes clips [B, 3, F, H, W]; fp32 out."""
    parts = []
    for part in video.split(_AT_ONCE if video.is_cuda else 4):
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            parts.append(vae.decode(vae.encode(part).latent_dist.mode()).sample.float())
    return torch.cat(parts).clamp(-1, 1)


def vae_gate(vae: AutoencoderKLHunyuanVideo15, clips: Clips, domain: str) -> tuple[VaeGate, Tensor]:
    """Measures the VAE; returns the gate and the reconstructions."""
    shown = reconstruct(vae, clips.video)
    whole, body = psnr_by_frame(shown, clips.video), psnr_by_frame(shown, clips.video, clips.mask)
    return VaeGate(domain, tuple(whole.tolist()), tuple(body.tolist())), shown


@torch.no_grad()
def sample_videos(
    pipeline: HunyuanVideo15ImageToVideoPipeline,
    scenes: Scenes,
    clips: Clips,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
) -> Tensor:
    """Lets the pipeline continue the first frames of clips, all of them at once, with Euler steps.

    Args:
        pipeline: on the clips' device.
        scenes: for the prompts.
        clips: for the first frames.
        steps: of sampling.
        guidance_scale: 1 for none.
        seed: of the noise.

    Returns:
        Videos [B, 3, F, H, W] in [-1, 1], fp32.
    """
    device, vae = clips.video.device, pipeline.vae
    denoiser = Denoiser(pipeline.transformer)
    sigmas = sampling_sigmas(steps, pipeline.scheduler.config.shift)
    texts = prompts_of(scenes)
    bank = PromptBank(pipeline, texts, device)
    prompts = torch.tensor([bank.index[text] for text in texts])
    videos = []
    for rows in torch.arange(len(scenes)).split(_AT_ONCE):
        first = clips.video[rows.to(device), :, :1]
        frame_latent = encode_clips(vae, first)
        vision = encode_vision(pipeline.image_encoder, first[:, :, 0])
        told = bank.conditions(prompts[rows], vision, frame_latent)
        untold = bank.conditions(torch.full_like(rows, bank.empty), vision, frame_latent)
        shape = (*frame_latent.shape[:2], (scenes.frames - 1) // 4 + 1, *frame_latent.shape[3:])
        latents = torch.stack([keyed_noise(shape[1:], seed, "sample", int(row)) for row in rows]).to(device)
        for now, then in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                velocity = denoiser.velocity(latents, now, told)
                if guidance_scale != 1:
                    blank = denoiser.velocity(latents, now, untold)
                    velocity = blank + guidance_scale * (velocity - blank)
            latents = euler_step(latents, velocity, now, then)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            videos.append(vae.decode(latents / vae.config.scaling_factor).sample.float().clamp(-1, 1))
    return torch.cat(videos)


def locate(video: Tensor, scenes: Scenes) -> Tensor:
    """Finds the character: the centroid of what differs from the true background.

    Args:
        video: [B, 3, F, H, W] in [-1, 1].
        scenes: of these clips, without posts.

    Returns:
        (x, y) in pixels [B, F, 2].
    """
    backdrop = scenes.backdrop.to(video.device)
    scenery = draw_backgrounds(backdrop, scenes.frames, video.shape[-1]).transpose(1, 2) * 2 - 1
    difference = ((video - scenery).abs().amax(1) - 0.25).clamp(min=0)
    difference = difference / difference.sum((2, 3), keepdim=True).clamp(min=1e-6)
    axis = torch.arange(video.shape[-1], device=video.device, dtype=torch.float32)
    return torch.stack([(difference * axis).sum((2, 3)), (difference * axis[:, None]).sum((2, 3))], dim=-1)


def motion_gate(video: Tensor, scenes: Scenes, clips: Clips, domain: str) -> MotionGate:
    """Measures whether generated clips move as their prompts say."""
    device, size = video.device, video.shape[-1]
    found = locate(video, scenes)
    options = torch.cartesian_prod(*(torch.arange(len(words)) for words in (MOTIONS, DIRECTIONS, SPEEDS))).to(device)
    known = paths(options[:, 0], options[:, 1], options[:, 2], scenes.frames) * size
    travelled = found - found[:, :1]
    # Limbs and rotation shift the centroid a little; a constant shift of the whole path does not count.
    difference = travelled[:, None] - known[None]
    distance = difference - difference.mean(2, keepdim=True)
    best = options[distance.square().sum((2, 3)).argmin(1)]
    truth = torch.stack([scenes.motion, scenes.direction, scenes.speed], dim=1).to(device)
    motion, direction, speed = (best == truth).float().mean(0).tolist()
    error = (found - clips.centers).norm(dim=-1).median()
    return MotionGate(domain, direction, motion, speed, float(error))


def save_grid(path: Path, *rows_of_videos: Tensor, clips: int = 8, every: int = 2) -> None:
    """Writes a PNG: for each of the first clips one row per given batch, frames from left to right.

    Args:
        path: of the picture.
        rows_of_videos: batches [B, 3, F, H, W] in [-1, 1], for example originals and reconstructions.
        clips: how many clips to show.
        every: show every so many frames.
    """
    shown = torch.stack([videos[:clips, :, ::every] for videos in rows_of_videos], dim=1)
    picture = shown.permute(0, 1, 4, 3, 5, 2).flatten(0, 2).flatten(1, 2)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
