"""The one place that calls the transformer: velocity(x_t, sigma, conditions), as student or as teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from vflora.flow import TIMESTEPS_PER_UNIT
from vflora.models.dense_attention import make_dense
from vflora.types import Conditions

TextMasks: TypeAlias = tuple[Tensor | None, Tensor | None]


class Denoiser:
    """The transformer behind one call.

    Teacher and student are the same weights: the student has its adapters on, the teacher has them off, which is
    bit for bit the base model and costs no second copy.
    """

    def __init__(self, transformer: HunyuanVideo15Transformer3DModel):
        """Takes the transformer and gives it the dense forward pass, in place."""
        make_dense(transformer)
        self.transformer = transformer
        self._adapters = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the frozen weights' arithmetic."""
        return self.transformer.dtype

    def velocity(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        conditions: Conditions,
        *,
        next_sigma: float | Tensor | None = None,
        masks: TextMasks | None = None,
    ) -> Tensor:
        """Predicts noise - clean.

        Args:
            latents: x_t [B, C, T, H, W], fp32.
            sigma: noise level, one for all or [B].
            conditions: of the same B samples, on the same device.
            next_sigma: noise level after this step, which MeanFlow (step-distilled) checkpoints are told.
            masks: what `text_masks` makes of the conditions, which it does by a copy from main memory; CUDA graphs
                cannot replay that and bring their own.

        Returns:
            The velocity [B, C, T, H, W], fp32.

        Raises:
            ValueError: if the conditions are of another number of samples.
        """
        batch = latents.shape[0]
        if len(conditions) != batch:
            raise ValueError(f"{batch} latents, but conditions of {len(conditions)} samples")
        meanflow = self.transformer.config.use_meanflow
        following = 0.0 if next_sigma is None else next_sigma
        prompt_mask, quoted_mask = text_masks(conditions) if masks is None else masks
        (prediction,) = self.transformer(
            hidden_states=self.model_input(latents, conditions),
            timestep=_timestep(sigma, batch, latents.device),
            timestep_r=_timestep(following, batch, latents.device) if meanflow else None,
            encoder_hidden_states=conditions.prompt_embeds.to(self.dtype),
            encoder_attention_mask=prompt_mask,
            encoder_hidden_states_2=conditions.prompt_embeds_2.to(self.dtype),
            encoder_attention_mask_2=quoted_mask,
            image_embeds=conditions.image_embeds.to(self.dtype),
            return_dict=False,
        )
        return prediction.float()

    def model_input(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Returns noisy latents, the reference in frame 0, and the mask that says so, [B, 2C + 1, T, H, W]."""
        reference = torch.zeros_like(latents)
        given = torch.zeros_like(latents[:, :1])
        if conditions.first_frame is not None:
            reference[:, :, :1] = conditions.first_frame
            given[:, :, :1] = 1
        return torch.cat([latents, reference, given], dim=1).to(self.dtype)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the model is the base model, and nothing records gradients.

        Only peft's own switch is flipped: `disable_adapters()` would also flip `requires_grad`, which freezes
        parameters for good under FSDP2.
        """
        for layer in self._adapters:
            layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self._adapters:
                layer._disable_adapters = False

    def lora_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Returns what is trained, by name."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}


def _timestep(sigma: float | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(sigma, Tensor):
        # Filled on the device: a copy from main memory makes the processor wait for all work that is queued.
        sigma = torch.full((), sigma, dtype=torch.float32, device=device)
    return (sigma.to(device, torch.float32) * TIMESTEPS_PER_UNIT).expand(batch)


def text_masks(conditions: Conditions) -> TextMasks:
    """Returns which tokens of the prompts and of the quoted texts are valid.

    Returns:
        Bool [B, N] and [B, N2] on the device of the conditions, each None where every token is valid.
    """
    return (
        _mask(conditions.prompt_embeds, conditions.prompt_lengths),
        _mask(conditions.prompt_embeds_2, conditions.prompt_lengths_2),
    )


def need_masks(conditions: Conditions) -> tuple[bool, bool]:
    """Returns whether prompts, and whether quoted texts, have tokens that are not valid."""
    return (
        _is_padded(conditions.prompt_embeds, conditions.prompt_lengths),
        _is_padded(conditions.prompt_embeds_2, conditions.prompt_lengths_2),
    )


def _is_padded(text: Tensor, lengths: tuple[int, ...]) -> bool:
    return any(length != text.shape[1] for length in lengths)


def _mask(text: Tensor, lengths: tuple[int, ...]) -> Tensor | None:
    if not _is_padded(text, lengths):
        return None
    # Page-locked, so that the processor need not wait for the copy.
    known = torch.tensor(lengths, pin_memory=text.is_cuda).to(text.device, non_blocking=True)
    return torch.arange(text.shape[1], device=text.device) < known[:, None]
