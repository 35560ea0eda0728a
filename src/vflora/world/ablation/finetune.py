"""Plain flow matching of a LoRA on clips: the oracle, which sees real videos, and stills passed off as videos.

Same LoRA, optimizer, schedule, steps and batch as the recipe's arms; only the objective and the data differ.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from tqdm import trange

from vflora.config import TORCH_DTYPES, OptimizerConfig
from vflora.config import LoraConfig as LoraDefaults
from vflora.models.denoiser import Denoiser
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import from_transformer, write_lora
from vflora.optimizer import LoraOptimizer
from vflora.random_streams import keyed_seed
from vflora.world.ablation.lab import LabConfig
from vflora.world.base_training import BaseTraining, draw_sigmas, flow_errors
from vflora.world.latent_pool import LatentPool
from vflora.world.models import WorldSizes
from vflora.world.vae_training import make_fast

_CLIPS = 4096


def finetune(lab: LabConfig, output: Path, *, still: bool, seed: int) -> Path:
    """Trains a LoRA on clips of the creatures that the other arms know from stills.

    Args:
        lab: what all arms share.
        output: file to write.
        still: every clip is its first frame, repeated.
        seed: of weights, clips and noise.

    Returns:
        `output`, a LoRA for diffusers.
    """
    sizes, device, dtype = WorldSizes(), lab.torch_device(), TORCH_DTYPES[lab.dtype]
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(lab.world_folder)
    make_fast(pipeline.vae)
    defaults = LoraDefaults()
    transformer = pipeline.transformer.to(dtype)
    add_lora(
        transformer,
        rank=defaults.lora_r,
        alpha=defaults.lora_alpha,
        dropout=0.0,
        targets=defaults.lora_target_modules,
        seed=seed,
    )
    denoiser = Denoiser(transformer.to(device))
    # A clip for every picture drawn would be one for each sample; more are never seen.
    pool = LatentPool(
        min(_CLIPS, lab.steps * lab.batch_size),
        pipeline,
        frames=sizes.frames,
        size=sizes.frame_size,
        device=device,
        seed=keyed_seed(seed, "ablation clips"),
        domain="creatures",
        still=still,
    )
    optimizer = LoraOptimizer(
        denoiser.lora_parameters(),
        OptimizerConfig(learning_rate=lab.learning_rate, max_train_steps=lab.steps, warmup_steps=lab.steps // 20),
    )
    generator = torch.Generator(device).manual_seed(keyed_seed(seed, "ablation flow"))
    blank_every = BaseTraining().blank_every
    for step in trange(lab.steps, desc="flow matching", unit="step"):
        clean, conditions = pool.draw(lab.batch_size, blank=(step + 1) % blank_every == 0)
        sigma = draw_sigmas(lab.batch_size, sizes.shift, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        flow_errors(denoiser, clean, conditions, sigma, noise).mean().backward()
        optimizer.step(step + 1)
    return write_lora(from_transformer(transformer, ADAPTER), output, "diffusers")
