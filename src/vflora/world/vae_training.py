"""Training of the world's VAE: an ordinary codec for small videos.

It stands for a general video codec, which has seen every kind of picture, so it trains on the looks of both domains:
the geometric characters, and creatures that belong to no split of the experiments. That teaches nobody how a
creature moves: a codec only says what can be drawn.

Two lessons from earlier attempts are built in. It always sees all frames of a clip, since the middle attention that
has only seen short clips washes out the colours of later frames. And most of the time it sees windows around the
character, since the rest of a frame is calm; the last part of the time goes to whole frames, so that the attention
meets as many positions as in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Downsample,
    HunyuanVideo15Upsample,
)
from torch import Tensor, nn

from vflora.models.video_vae import patch_frame_attention
from vflora.random_streams import keyed_seed
from vflora.world.clip_pool import ClipPool
from vflora.world.models import WorldSizes, build_vae
from vflora.world.training_loop import Clock, LoopSettings, StageRun


@dataclass(frozen=True)
class VaeTraining:
    """How the VAE is trained.

    Attributes:
        batch_size: clips per step.
        crop: side of the windows around the character, in pixels, divisible by 4.
        whole_from: share of the time from which on whole frames are shown.
        body_weight: how much more a pixel of the character counts than one of the background.
        gradient_weight: of the L1 difference of spatial gradients, which keeps edges sharp.
        kl_weight: of the mean divergence per latent number; small, so that it only keeps the latents smooth.
        pool: clips that are held rendered.
        refresh_every: steps between two chunks of fresh clips.
        loop: optimisation.
    """

    batch_size: int = 32
    crop: int = 40
    whole_from: float = 0.8
    body_weight: float = 2.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-4
    pool: int = 8192
    refresh_every: int = 16
    loop: LoopSettings = LoopSettings(peak_lr=1e-3, muon_lr=3e-3, warmup_steps=200)


class EdgePaddedConv(HunyuanVideo15CausalConv3d):
    """The VAE's convolution with its padding made by joining edges.

    The result is the same. The backward pass of the stock padding adds gradients one number at a time and in
    another memory layout, which takes longer than the convolution.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to [B, C', T', H', W']."""
        left, right, top, bottom, before, _ = self.time_causal_padding
        x = _extend(hidden_states, 4, left, right)
        x = _extend(x, 3, top, bottom)
        return self.conv(_extend(x, 2, before, 0))


def _extend(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    parts = [first] * before + [x] + [last] * after
    return torch.cat(parts, dim) if len(parts) > 1 else x


def make_fast(vae: AutoencoderKLHunyuanVideo15) -> None:
    """Gives the VAE loop-free attention and quick padding and lets it compile, in place; weights and results stay."""
    patch_frame_attention(vae)
    for module in vae.modules():
        if type(module) is HunyuanVideo15CausalConv3d:
            module.__class__ = EdgePaddedConv
        elif isinstance(module, HunyuanVideo15Downsample):
            # numpy's bool, which the compiler takes for data that it must not branch on
            module.add_temporal_downsample = bool(module.add_temporal_downsample)
        elif isinstance(module, HunyuanVideo15Upsample):
            module.add_temporal_upsample = bool(module.add_temporal_upsample)


def reconstruction_loss(output: Tensor, target: Tensor, mask: Tensor, settings: VaeTraining) -> Tensor:
    """Weighs L1, squared error and the L1 difference of gradients; fp32 in, scalar out.

    Args:
        output: [B, 3, F, H, W].
        target: same shape, in [-1, 1].
        mask: [B, 1, F, H, W] in [0, 1], the character.
        settings: the weights.
    """
    weight = 1 + settings.body_weight * mask
    weight = weight / weight.mean()
    error = output - target
    pixels = (weight * (error.abs() + 4 * error.square())).mean()
    rows = (error.diff(dim=3).abs() * weight[..., 1:, :]).mean()
    columns = (error.diff(dim=4).abs() * weight[..., 1:]).mean()
    return pixels + settings.gradient_weight * (rows + columns)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence to the unit normal per latent number (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def train_vae(
    sizes: WorldSizes,
    settings: VaeTraining,
    *,
    folder: Path,
    clock: Clock,
    device: torch.device,
    seed: int,
    compiled: bool,
    resume: bool,
    max_steps: int | None = None,
) -> AutoencoderKLHunyuanVideo15:
    """Trains the VAE and keeps it in `folder`/vae, with metrics and the resumable state in `folder`/training.

    Returns:
        The averaged VAE, scaled to latents of unit variance, fp32 on `device`, in eval mode.
    """
    vae = build_vae(sizes, seed)
    kept = folder / "vae"
    if resume and (kept / "config.json").is_file():
        vae.load_state_dict(AutoencoderKLHunyuanVideo15.from_pretrained(kept).state_dict())
    make_fast(vae)
    vae = vae.to(device)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    pool = ClipPool(
        settings.pool,
        domains=("geometric", "creatures"),
        frames=sizes.frames,
        size=sizes.frame_size,
        device=device,
        seed=seed,
    )
    run = StageRun(
        name="vae",
        module=vae,
        loss=_Objective(vae, pool, settings, seed, compiled),
        settings=settings.loop,
        clock=clock,
        folder=folder / "training",
        keep=partial(_keep, sizes, pool, kept, device),
        hidden=[p for p in vae.parameters() if p.ndim == 5],
        resume=resume,
        max_steps=max_steps,
    )
    run.run()
    return AutoencoderKLHunyuanVideo15.from_pretrained(kept).to(device).eval()


class _Objective:
    """The loss of a step; whole frames are shown late, by the uncompiled network: another compilation costs more."""

    def __init__(
        self, vae: AutoencoderKLHunyuanVideo15, pool: ClipPool, settings: VaeTraining, seed: int, compiled: bool
    ) -> None:
        self._pool, self._settings = pool, settings
        self._generator = torch.Generator(pool.video.device).manual_seed(keyed_seed(seed, "posterior"))
        self._plain: tuple[nn.Module, nn.Module] = (vae.encoder, vae.decoder)
        self._quick = tuple(torch.compile(m, dynamic=False) for m in self._plain) if compiled else self._plain

    def __call__(self, step: int, fraction: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        settings, whole = self._settings, fraction >= self._settings.whole_from
        if step % settings.refresh_every == 0:
            self._pool.refresh()
        video, mask = self._pool.draw(settings.batch_size, None if whole else settings.crop)
        encoder, decoder = self._plain if whole else self._quick
        with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
            mean, log_variance = encoder(video).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=self._generator, device=mean.device)
            latents = mean + (0.5 * log_variance).exp() * noise
            output = decoder(latents).float()
        loss = reconstruction_loss(output, video, mask, settings)
        kl = divergence(mean, log_variance)
        squared = (output.detach() - video).square().mean()
        numbers: dict[str, Tensor | float] = {
            "psnr": 10 * torch.log10(4 / squared),
            "kl": kl.detach(),
            "whole": float(whole),
            "render_s": self._pool.refresh_s,
        }
        return loss + settings.kl_weight * kl, numbers


@torch.no_grad()
def _keep(sizes: WorldSizes, pool: ClipPool, folder: Path, device: torch.device, weights: dict[str, Tensor]) -> None:
    """Writes the averaged VAE with the scale that gives its latents unit variance, as the transformer expects."""
    vae = build_vae(sizes, seed=0)
    vae.load_state_dict(weights)
    make_fast(vae)
    vae = vae.to(device)
    video, _ = pool.draw(min(64, len(pool.video)))
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):  # these shapes come too seldom to be tuned for
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in video.split(8)])
    vae.register_to_config(scaling_factor=round(float(latents.square().mean().rsqrt()), 5))
    vae.to(torch.bfloat16).save_pretrained(folder)
