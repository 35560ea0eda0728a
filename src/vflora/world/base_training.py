"""Training of the world's base model: image to video, on geometric characters only.

Flow matching as HunyuanVideo-1.5 does it: the noise level is uniform before the time shift that sampling uses, the
model predicts noise - clean for all frames, and the first frame comes in as clean latents and a mask along the
channels. Every tenth batch has no prompt, for classifier-free guidance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
from torch import Generator, Tensor, nn

from vflora.errors import UserError
from vflora.flow import add_noise, velocity_target
from vflora.models.denoiser import Denoiser
from vflora.random_streams import keyed_seed
from vflora.types import Conditions
from vflora.world.characters import Split
from vflora.world.latent_pool import LatentPool
from vflora.world.models import WorldSizes, build_pipeline, build_transformer
from vflora.world.training_loop import Clock, LoopSettings, StageRun
from vflora.world.vae_training import make_fast

SHARD_SIZE = "15MB"


@dataclass(frozen=True)
class BaseTraining:
    """How the base model is trained.

    Attributes:
        batch_size: clips per step.
        pool: clips that are rendered and encoded beforehand.
        blank_every: every so many steps the whole batch has no prompt.
        splits: which geometric characters the clips show, in equal parts. With the 48 of true shape alone the model
            learns them by heart and turns every stranger into one of them at once; bent ones make it look at the
            first frame. Without a share of their own, the true ones would be one clip in forty.
        clip_seed: of the clips and of the order in which they are drawn.
        loop: optimisation.
    """

    batch_size: int = 256
    pool: int = 49152
    blank_every: int = 10
    splits: tuple[Split, ...] = ("general", "train", "general")
    clip_seed: int = 0
    loop: LoopSettings = LoopSettings(peak_lr=1e-3, muon_lr=1e-3, warmup_steps=500, weight_decay=0.01, ema_decay=0.9995)


def draw_sigmas(count: int, shift: float, generator: Generator) -> Tensor:
    """Draws noise levels in (0, 1), evenly spread over a batch before the time shift; [B] on the generator's device."""
    device = generator.device
    offsets = torch.rand(count, generator=generator, device=device)
    uniform = (torch.randperm(count, generator=generator, device=device) + offsets) / count
    return shift * uniform / (1 + (shift - 1) * uniform)


def flow_errors(denoiser: Denoiser, clean: Tensor, conditions: Conditions, sigma: Tensor, noise: Tensor) -> Tensor:
    """The flow-matching loss of each clip: mean squared error of the velocity at one noise level.

    Args:
        denoiser: the model.
        clean: latents [B, C, T, H, W].
        conditions: of the same clips.
        sigma: noise levels [B].
        noise: as `clean`.

    Returns:
        [B].
    """
    noisy = add_noise(clean, noise, sigma.view(-1, 1, 1, 1, 1))
    velocity = denoiser.velocity(noisy, sigma, conditions)
    return (velocity - velocity_target(clean, noise)).square().mean(dim=(1, 2, 3, 4))


def train_base(
    sizes: WorldSizes,
    settings: BaseTraining,
    *,
    folder: Path,
    clock: Clock,
    device: torch.device,
    seed: int,
    compiled: bool,
    resume: bool,
    max_steps: int | None = None,
) -> None:
    """Trains the transformer on the latents of `folder`/vae and makes `folder` a whole diffusers pipeline.

    Raises:
        UserError: if there is no VAE yet.
    """
    vae_folder = folder / "vae"
    if not (vae_folder / "config.json").is_file():
        raise UserError(f"There is no VAE in {vae_folder}: train it first with --stage vae.")
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(vae_folder).requires_grad_(False).eval()
    transformer = build_transformer(sizes, seed)
    kept = folder / "transformer"
    if resume and (kept / "config.json").is_file():
        transformer.load_state_dict(HunyuanVideo15Transformer3DModel.from_pretrained(kept).state_dict())
    make_fast(vae)
    pipeline = build_pipeline(sizes, vae, transformer, seed)
    transformer.to(device)
    pool = LatentPool(
        settings.pool,
        pipeline,
        frames=sizes.frames,
        size=sizes.frame_size,
        device=device,
        seed=settings.clip_seed,
        splits=settings.splits,
    )
    StageRun(
        name="base",
        module=transformer,
        loss=_Objective(transformer, pool, sizes, settings, device, seed, compiled),
        settings=settings.loop,
        clock=clock,
        folder=folder / "training",
        keep=partial(_keep, sizes, folder, seed),
        hidden=[p for p in transformer.transformer_blocks.parameters() if p.ndim == 2],
        resume=resume,
        max_steps=max_steps,
    ).run()


class FlowErrors(nn.Module):
    """`flow_errors` as a function of tensors alone, which is what a CUDA graph can be made of."""

    def __init__(self, transformer: HunyuanVideo15Transformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self._denoiser = Denoiser(transformer)

    def forward(
        self, clean: Tensor, noise: Tensor, sigma: Tensor, prompt_embeds: Tensor, glyphs: Tensor, image_embeds: Tensor
    ) -> Tensor:
        """Returns [B]; all prompts are of one length, as `LatentPool.draw` gives them."""
        conditions = Conditions(
            prompt_embeds=prompt_embeds,
            prompt_lengths=(prompt_embeds.shape[1],) * len(clean),
            prompt_embeds_2=glyphs,
            prompt_lengths_2=(glyphs.shape[1],) * len(clean),
            image_embeds=image_embeds,
            first_frame=clean[:, :, :1],
        )
        return flow_errors(self._denoiser, clean, conditions, sigma, noise)


class ReplayedFlowErrors:
    """`FlowErrors` from CUDA graphs, one for each length of prompt.

    An H200 has 22 ms of work with a step of a model this small, and Python takes longer than that to ask for it. With
    the graphs a step takes 26 ms.
    """

    def __init__(self, transformer: HunyuanVideo15Transformer3DModel) -> None:
        self._transformer = transformer
        # One memory for all: each is done with its backward pass before another begins.
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._graphs: dict[torch.Size, Callable[..., Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As `FlowErrors`; whatever is new for a length of prompt is compiled and recorded at its first call.

        No autograd graph of the weights may be alive then: it ties them to its stream, and recording is on another.
        """
        key = inputs[3].shape
        if key not in self._graphs:
            with warnings.catch_warnings():
                # PyTorch's own warm-up keeps its autograd graph until it has recorded, on another stream: one wait.
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
                self._graphs[key] = torch.cuda.make_graphed_callables(
                    FlowErrors(self._transformer), inputs, allow_unused_input=True, pool=self._pool
                )
        return self._graphs[key](*inputs)


class _Objective:
    """The loss of a step."""

    def __init__(
        self,
        transformer: HunyuanVideo15Transformer3DModel,
        pool: LatentPool,
        sizes: WorldSizes,
        settings: BaseTraining,
        device: torch.device,
        seed: int,
        compiled: bool,
    ) -> None:
        # No prompt of the world quotes text, so the byT5 projection gets no gradient and stays at zero.
        transformer.context_embedder_2.requires_grad_(False)
        self._errors = (ReplayedFlowErrors if device.type == "cuda" else FlowErrors)(transformer)
        self._pool, self._settings, self._shift = pool, settings, sizes.shift
        self._generator = torch.Generator(device).manual_seed(keyed_seed(seed, "flow"))
        if compiled:
            # One graph serves all blocks; each length of text needs its own.
            torch._dynamo.config.recompile_limit = 64
            for block in transformer.transformer_blocks:
                block.compile(dynamic=False)

    def __call__(self, step: int, fraction: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        del fraction
        blank = (step + 1) % self._settings.blank_every == 0
        clean, conditions = self._pool.draw(self._settings.batch_size, blank=blank)
        sigma = draw_sigmas(len(clean), self._shift, self._generator)
        noise = torch.randn(clean.shape, generator=self._generator, device=clean.device)
        told = (conditions.prompt_embeds, conditions.prompt_embeds_2, conditions.image_embeds)
        # Graphs keep no weight that autocast has cast: the next step has changed it.
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=clean.is_cuda, cache_enabled=False):
            error = self._errors(clean, noise, sigma, *told)
        high = sigma > 0.8
        numbers: dict[str, Tensor | float] = {
            "loss_high_noise": (error.detach() * high).sum() / high.sum(),
            "blank": float(blank),
        }
        return error.mean(), numbers


def _keep(sizes: WorldSizes, folder: Path, seed: int, weights: dict[str, Tensor]) -> None:
    """Writes the whole pipeline with the averaged transformer, in bf16."""
    transformer = build_transformer(sizes, seed=0)
    transformer.load_state_dict(weights)
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(folder / "vae")
    pipeline = build_pipeline(sizes, vae, transformer, seed).to(torch.bfloat16)
    pipeline.save_pretrained(folder, max_shard_size=SHARD_SIZE)
