"""Attention and forward pass of the transformer without padding and without a mask.

The stock processor builds a boolean [B, 1, S, S] mask even when every token is valid, which keeps the flash kernels
away, and the stock forward pass sorts tokens in a Python loop that waits for the accelerator twice per sample.
Dropping padded tokens first is exact: they never reach a valid token. What remains of masking is one row of keys
for batches of texts of unequal length.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn.functional import pad

from vflora.errors import UserError
from vflora.models.attention_choice import attend

if TYPE_CHECKING:
    from vflora.distributed.ulysses import Ulysses


class DenseAttention:
    """Joint attention over video and text tokens, with at most a key mask [B, text tokens]."""

    # The names and the class attributes are those that diffusers' `set_attention_backend` and context parallelism
    # look for on a processor.
    _attention_backend = None
    _parallel_config = None

    ulysses: Ulysses | None = None
    """Who shares the tokens, where they divide evenly."""
    padding = 0
    """Tokens at the end of the last such process that are none."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the attended video tokens [B, N, C] and text tokens [B, M, C]."""
        video_tokens = hidden_states.shape[1]

        def heads(project: nn.Module, tokens: Tensor) -> Tensor:
            return project(tokens).unflatten(2, (attn.heads, -1))

        def query() -> Tensor:
            video = apply_rotary_emb(attn.norm_q(heads(attn.to_q, hidden_states)), image_rotary_emb, sequence_dim=1)
            return torch.cat([video, attn.norm_added_q(heads(attn.add_q_proj, encoder_hidden_states))], dim=1)

        def key() -> Tensor:
            video = apply_rotary_emb(attn.norm_k(heads(attn.to_k, hidden_states)), image_rotary_emb, sequence_dim=1)
            return torch.cat([video, attn.norm_added_k(heads(attn.add_k_proj, encoder_hidden_states))], dim=1)

        def value() -> Tensor:
            video = heads(attn.to_v, hidden_states)
            return torch.cat([video, heads(attn.add_v_proj, encoder_hidden_states)], dim=1)

        if attention_mask is not None:
            attention_mask = pad(attention_mask, (video_tokens, 0), value=True)
        kernel = self._attention_backend
        if self.ulysses is None:
            joint = attend(query(), key(), value(), attention_mask, kernel, self._parallel_config)
        else:
            joint = self.ulysses.attend(query, key, value, attention_mask, kernel, self.padding)
        joint = joint.flatten(2, 3)
        video, text = joint[:, :video_tokens], joint[:, video_tokens:]
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)


def make_dense(transformer: HunyuanVideo15Transformer3DModel) -> None:
    """Gives `transformer` the dense attention and forward pass, in place.

    Calls keep the stock signature, with one difference: a mask of None says that every token is valid.

    Raises:
        UserError: if something has wrapped the forward pass, as offloading does, and would be lost.
    """
    own = vars(transformer).get("forward")
    if own is not None and getattr(own, "__func__", None) not in (_dense_forward, type(transformer).forward):
        raise UserError(
            "This transformer's forward pass is wrapped already, by offloading for instance, which would be lost: load "
            "the pipeline with vflora.load_pipeline(..., offloading=True), or call "
            "vflora.sampling.prepare_for_sampling(pipeline) before you offload or compile it."
        )
    for block in transformer.transformer_blocks:
        block.attn.set_processor(DenseAttention())
    transformer.forward = MethodType(_dense_forward, transformer)


def _dense_forward(
    self: HunyuanVideo15Transformer3DModel,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor | None = None,
    timestep_r: Tensor | None = None,
    encoder_hidden_states_2: Tensor | None = None,
    encoder_attention_mask_2: Tensor | None = None,
    image_embeds: Tensor | None = None,
    attention_kwargs: dict | None = None,
    return_dict: bool = True,
):
    if attention_kwargs:
        raise ValueError("the dense forward pass takes no attention_kwargs; scale the LoRA with set_adapters instead")
    dtype = hidden_states.dtype
    size = hidden_states.shape[2:]
    rotary = self.rope(hidden_states)
    temb = _time_embedding(self, timestep, timestep_r, dtype)
    video = self.x_embedder(hidden_states)

    text = self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    parts = [text + _kind(self, 0, text)]
    masks = [encoder_attention_mask]
    if encoder_hidden_states_2 is not None and encoder_hidden_states_2.shape[1] > 0:
        quoted = self.context_embedder_2(encoder_hidden_states_2)
        parts.insert(0, quoted + _kind(self, 1, quoted))
        masks.insert(0, encoder_attention_mask_2)
    if image_embeds is not None and image_embeds.shape[1] > 0:
        vision = self.image_embedder(image_embeds)
        parts.insert(0, vision + _kind(self, 2, vision))
        masks.insert(0, None)
    context = torch.cat(parts, dim=1)
    mask = _key_mask(parts, masks)
    if mask is not None:
        # Rows of padding may hold anything; as queries they must at least stay finite.
        context = context.masked_fill(~mask[..., None], 0)
    context, mask = _divisible(context, mask, self.transformer_blocks)

    recompute = torch.is_grad_enabled() and self.gradient_checkpointing
    for block in self.transformer_blocks:
        if recompute:
            video, context = self._gradient_checkpointing_func(block, video, context, temb, mask, rotary)
        else:
            video, context = block(video, context, temb, mask, rotary)

    velocity = _unpatchify(self.proj_out(self.norm_out(video, temb)), size, self.config)
    return (velocity,) if not return_dict else Transformer2DModelOutput(sample=velocity)


def _kind(transformer: HunyuanVideo15Transformer3DModel, kind: int, tokens: Tensor) -> Tensor:
    """Returns what is added to every token of one kind; the layer is called, since its weights may have to come."""
    index = torch.full((1,), kind, device=tokens.device)
    return transformer.cond_type_embed(index).to(tokens.dtype)


def _time_embedding(
    transformer: HunyuanVideo15Transformer3DModel,
    timestep: Tensor,
    timestep_r: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    # The sinusoids are made in fp32 and cast afterwards: a timestep rounded to bf16 is off by up to 2 in 1000.
    embed = transformer.time_embed
    temb = embed.timestep_embedder(embed.time_proj(timestep.float()).to(dtype))
    if timestep_r is not None:
        temb = temb + embed.timestep_embedder_r(embed.time_proj_r(timestep_r.float()).to(dtype))
    return temb


def _key_mask(parts: list[Tensor], masks: list[Tensor | None]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    return torch.cat(
        [
            part.new_ones(part.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            for part, mask in zip(parts, masks, strict=True)
        ],
        dim=1,
    )


def _divisible(context: Tensor, mask: Tensor | None, blocks: nn.ModuleList) -> tuple[Tensor, Tensor | None]:
    """Pads the text so that every process gets equally much of it, and tells the blocks how many tokens are none."""
    ulysses = _processor(blocks[0]).ulysses
    if ulysses is None:
        return context, mask
    missing = -context.shape[1] % ulysses.size
    for block in blocks:
        _processor(block).padding = missing
    if missing == 0:
        return context, mask
    if mask is not None:
        mask = pad(mask, (0, missing), value=False)
    return pad(context, (0, 0, 0, missing)), mask


def _processor(block: nn.Module) -> DenseAttention:
    return cast(DenseAttention, cast(Any, block).attn.processor)


def _unpatchify(tokens: Tensor, size: torch.Size, config) -> Tensor:
    time, height, width = (
        length // patch for length, patch in zip(size, (config.patch_size_t,) + (config.patch_size,) * 2, strict=True)
    )
    grid = tokens.unflatten(1, (time, height, width)).unflatten(
        -1, (-1, config.patch_size_t, config.patch_size, config.patch_size)
    )
    # A copy, however small the patches: sharding hangs its hooks on the result and takes no views.
    return grid.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3).clone()
