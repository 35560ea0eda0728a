"""What the switches of `SpeedConfig` do to the frozen transformer, to who leads rollouts, and to who learns."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch import nn

from vflora.config import require
from vflora.models.attention_choice import choose_attention
from vflora.models.compiling import allow_recompiles
from vflora.models.denoiser import Denoiser
from vflora.models.fast_teacher import FastTeacher
from vflora.models.graphed_student import GraphedStudent
from vflora.models.graphed_teacher import GraphedTeacher
from vflora.models.lean_lora import lean_lora
from vflora.models.light_decoder import lighten_decoder
from vflora.models.offload import BlockOffload
from vflora.models.precision import Fp8Switch, check_fp8, quantize_blocks
from vflora.models.recompute import BlockRecompute
from vflora.models.roles import Student, Teacher
from vflora.models.speed_config import SpeedConfig


@dataclass
class Acceleration:
    """What `accelerate` set up and the training loop keeps talking to."""

    config: SpeedConfig
    switch: Fp8Switch
    recompute: BlockRecompute

    def teacher(
        self, denoiser: Denoiser, exact_sigmas: Callable[[int], Collection[float]], *, guidance_scale: float = 1.0
    ) -> Teacher:
        """Returns who leads the rollouts.

        Args:
            denoiser: the model.
            exact_sigmas: what will be harvested from each rollout, by its number.
            guidance_scale: of the rollouts.
        """
        leader = GraphedTeacher(denoiser, self.switch) if self.config.rollout_graphs else denoiser
        stride = self.config.stride(guidance_scale)
        if self.config.rollout_precision == "full" and stride == 1:
            return leader
        return FastTeacher(leader, exact_sigmas, switch=self.switch, stride=stride)

    def student(self, denoiser: Denoiser) -> Student:
        """Returns who learns."""
        return GraphedStudent(denoiser, self.recompute) if self.config.student_graphs else denoiser

    def end_step(self, least: Callable[[int], int] = int) -> None:
        """Tells that an optimizer step is over; `least` as for `BlockRecompute.end_step`."""
        self.recompute.end_step(least)


def accelerate(
    transformer: HunyuanVideo15Transformer3DModel, config: SpeedConfig, device: torch.device
) -> Acceleration:
    """Places the transformer on `device` and sets it up as `config` says, in place.

    Call it after the LoRA has been added and the dense attention set. With 8-bit storage or block offload the
    transformer may come from main memory and never is on the device as a whole.

    Raises:
        UserError: if the device lacks what an option needs.
    """
    require(
        not (config.compile and device.type == "cpu"),
        "--compile is for GPUs (on CPUs, code that PyTorch compiles got gradients wrong by some percent): drop it, or "
        "--mode fast where that brought it in.",
    )
    if config.rollout_precision == "fp8":
        check_fp8(device)
    switch = Fp8Switch()
    if config.rollout_precision == "fp8" or config.weight_storage != "full":
        switch = quantize_blocks(
            transformer,
            storage=config.weight_storage,
            fp8_rollouts=config.rollout_precision == "fp8",
            device=device,
            home=torch.device("cpu") if config.block_offload else device,
        )
    lean_lora(transformer, narrow=config.lora_precision == "bf16")
    if config.block_offload:
        BlockOffload(transformer, transformer.transformer_blocks, device).begin()
    else:
        nn.Module.to(transformer, device)
    choose_attention(transformer, config.attention_backend, device)
    recompute = BlockRecompute(transformer, "true" if config.block_offload else config.enable_gradient_checkpointing)
    if config.compile:
        compile_blocks(transformer)
    return Acceleration(config, switch, recompute)


def accelerate_decoder(vae: AutoencoderKLHunyuanVideo15, config: SpeedConfig) -> None:
    """Gives the frozen VAE the decoder that remembers little, in place; compiled if `config` says so.

    Call it with the VAE on its device. On the CPU, where memory is not what runs out, the stock decoder stays.
    """
    if vae.device.type != "cpu":
        lighten_decoder(vae, compiled=config.compile)


def compile_blocks(transformer: HunyuanVideo15Transformer3DModel) -> None:
    """Compiles every block, in place; they share one compiled code for each way of being called.

    Each size of video has code of its own, whatever came before: PyTorch would otherwise make code for any size when a
    second one comes, use it for the first one too, and round otherwise than a run that was resumed in between. Prompts
    differ in length all the time, so the text tokens' dimension is declared dynamic at the first block, where every
    compilation starts.
    """
    allow_recompiles()
    for block in transformer.transformer_blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    transformer.transformer_blocks[0].register_forward_pre_hook(_declare_text_dynamic)


def _declare_text_dynamic(module: nn.Module, args: tuple[Any, ...]) -> None:
    torch._dynamo.maybe_mark_dynamic(args[1], 1)
