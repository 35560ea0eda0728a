"""Decoding with gradients, as little of it as needed, and encoding the first frame.

The decoder is causal in time: the first k latent frames give exactly the first 4 (k - 1) + 1 frames of the whole
decode, so a loss that looks at early frames does not pay for late ones. Its attention is causal by frame and sits
only in the mid block at latent resolution; everything after it is local, so the rest can be computed in spatial
tiles that carry a border wide enough for their convolutions, and come out as if there were no tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15AttnBlock,
    HunyuanVideo15Decoder3D,
    HunyuanVideo15UpBlock3D,
)
from torch import Tensor

from vflora.distributed.strips import Strips
from vflora.models.light_decoder import LightDecoder, normed_conv

_RESNET_BORDER = 2  # two 3x3 convolutions
_CONV_BORDER = 1
_TILED_BLOCKS = 2  # the last ones: their activations are by far the largest


class FrameAttention(HunyuanVideo15AttnBlock):
    """The mid-block attention of the VAE, one latent frame of queries at a time.

    A query of frame i sees the keys of frames 0 to i, which is all that the stock S x S mask says. Without the mask
    there is nothing to build, batches work, and memory grows with S / T x S instead of S x S.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to the same shape."""
        normed = self.norm(x)
        query, key, value = (f(normed).flatten(3).permute(0, 2, 3, 1) for f in (self.to_q, self.to_k, self.to_v))
        attended = [
            F.scaled_dot_product_attention(
                query[:, i : i + 1], *(t[:, : i + 1].flatten(1, 2).unsqueeze(1) for t in (key, value))
            )
            for i in range(query.shape[1])
        ]
        out = torch.cat(attended, dim=1).permute(0, 3, 1, 2).unflatten(3, x.shape[3:])
        return self.proj_out(out) + x


def patch_frame_attention(vae: AutoencoderKLHunyuanVideo15) -> None:
    """Replaces the mid-block attention of this VAE (encoder and decoder), in place; weights and results stay."""
    for module in vae.modules():
        if type(module) is HunyuanVideo15AttnBlock:
            module.__class__ = FrameAttention


def latent_frames_for(frames: Sequence[int] | Tensor, temporal_ratio: int = 4) -> int:
    """Returns how many latent frames the latest of `frames` needs: frame 0 is the first, then four to each."""
    latest = int(torch.as_tensor(frames).max())
    return (latest + temporal_ratio - 1) // temporal_ratio + 1


def decode_frames(
    vae: AutoencoderKLHunyuanVideo15,
    latents: Tensor,
    frames: Sequence[int] | Tensor | None = None,
    checkpointed: bool = False,
    tile: int | None = None,
    strips: Strips | None = None,
) -> Tensor:
    """Decodes the wanted frames of a video; gradients flow back to the latents.

    Args:
        vae: a frozen VAE; `patch_frame_attention` is applied to it.
        latents: scaled latents [B, C, T, H, W], of any floating type.
        frames: frame indexes, the same for every sample [K], or a tensor of them per sample [B, K]; None for all.
        checkpointed: keep no activations between the decoder's layers and compute them again in the backward pass,
            also when the VAE is in eval mode.
        tile: side of the square tiles, in pixels of the frame, that the last and largest layers work in; None for
            whole frames. Implies `checkpointed` and gives the same result with far less memory.
        strips: processes that share the work and call this with the same latents; all of them get the frames, and,
            if all go on with them alike, the gradient.

    Returns:
        Frames [B, 3, K, H, W] in about [-1, 1], fp32.

    Raises:
        IndexError: if a frame lies outside the video.
        ValueError: if a recomputed decode would lose gradients of the VAE's own weights.
    """
    patch_frame_attention(vae)
    ratio = vae.temporal_compression_ratio
    last = (latents.shape[2] - 1) * ratio
    if frames is not None:
        wanted = torch.as_tensor(frames, device=latents.device)
        if wanted.numel() == 0 or int(wanted.min()) < 0 or int(wanted.max()) > last:
            raise IndexError(f"frames must lie between 0 and {last}, not {wanted.tolist()}")
        latents = latents[:, :, : latent_frames_for(wanted, ratio)]
    unscaled = (latents / vae.config["scaling_factor"]).to(vae.dtype)
    recompute = checkpointed or tile is not None
    if recompute and any(p.requires_grad for p in vae.decoder.parameters()):
        raise ValueError("freeze the VAE (vae.requires_grad_(False)) before a checkpointed or tiled decode")
    stages = _staged(vae.decoder, tile)

    def run(x: Tensor, stages: Sequence[_Stage]) -> Tensor:
        for stage in stages:
            x = cast(Tensor, _Recomputed.apply(x, stage, tile)) if recompute else stage.run(x)
        return x

    def choose(video: Tensor) -> Tensor:
        if frames is None or wanted.ndim == 1:
            return video if frames is None else video[:, :, wanted]
        index = wanted[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:])
        return video.gather(2, index)

    local = next(i for i, stage in enumerate(stages) if stage.border is not None)
    tail = _merged(stages[local:])
    x = run(unscaled, stages[:local])
    strip = strips and strips.strip(x, cast(int, tail.border))
    if strips is None or strip is None:
        return choose(run(x, stages[local:])).float()
    part = choose(run(strips.cut(x, strip), stages[local:]))
    return strips.join(part, strip, tail.scale, x.shape[strip.dim] * tail.scale).float()


@torch.no_grad()
def encode_first_frame(vae: AutoencoderKLHunyuanVideo15, images: Tensor) -> Tensor:
    """Encodes reference images as the pipeline does: the mode of the posterior times the scaling factor.

    Args:
        vae: the VAE; `patch_frame_attention` is applied to it.
        images: uint8 [B, 3, H, W], or floating in [-1, 1].

    Returns:
        Scaled latents [B, C, 1, H / 16, W / 16], fp32.
    """
    patch_frame_attention(vae)
    if images.dtype == torch.uint8:
        images = images.float() / 127.5 - 1
    pixels = images.to(vae.device, vae.dtype).unsqueeze(2)
    (posterior,) = cast(tuple, vae.encode(pixels, return_dict=False))
    return posterior.mode().float() * vae.config["scaling_factor"]


@dataclass(frozen=True)
class _Stage:
    """A run of decoder layers, with what a tile of it needs to know.

    Attributes:
        run: the layers, [B, C, T, H, W] in and out.
        border: input pixels around a tile that its output depends on; None if it depends on the whole frame.
        scale: output pixels per input pixel.
        pixels: pixels of the final frame per input pixel.
    """

    run: Callable[[Tensor], Tensor]
    border: int | None
    scale: int
    pixels: int


def _decoder_stages(decoder: HunyuanVideo15Decoder3D, pixels: int) -> list[_Stage]:
    def enter(x: Tensor) -> Tensor:
        return decoder.conv_in(x) + x.repeat_interleave(repeats=decoder.repeat, dim=1)

    def leave(x: Tensor) -> Tensor:
        if isinstance(decoder, LightDecoder):
            return normed_conv(x, decoder.norm_out, decoder.conv_out)
        return decoder.conv_out(decoder.conv_act(decoder.norm_out(x)))

    stages = [_Stage(enter, None, 1, pixels)]
    middle = decoder.mid_block
    stages.append(_Stage(middle.resnets[0], None, 1, pixels))
    for attention, resnet in zip(middle.attentions, list(middle.resnets)[1:], strict=True):
        stages += [_Stage(attention, None, 1, pixels), _Stage(resnet, None, 1, pixels)]
    for block in _up_blocks(decoder):
        stages += [_Stage(resnet, _RESNET_BORDER, 1, pixels) for resnet in block.resnets]
        for upsample in block.upsamplers or ():
            stages.append(_Stage(upsample, _CONV_BORDER, 2, pixels))
            pixels //= 2
    return [*stages, _Stage(leave, _CONV_BORDER, 1, pixels)]


def _up_blocks(decoder: HunyuanVideo15Decoder3D) -> list[HunyuanVideo15UpBlock3D]:
    return cast(list[HunyuanVideo15UpBlock3D], list(decoder.up_blocks))


def _staged(decoder: HunyuanVideo15Decoder3D, tile: int | None) -> list[_Stage]:
    """The decoder as a list of stages, the last and largest ones in one if they work in tiles."""
    spatial = 2 ** sum(1 for block in _up_blocks(decoder) if block.upsamplers is not None)
    stages = _decoder_stages(decoder, spatial)
    if tile is not None:
        first = len(stages) - 1 - sum(_layers(block) for block in _up_blocks(decoder)[-_TILED_BLOCKS:])
        stages = [*stages[:first], _merged(stages[first:])]
    return stages


def _layers(block: HunyuanVideo15UpBlock3D) -> int:
    return len(block.resnets) + len(block.upsamplers or ())


def _merged(stages: list[_Stage]) -> _Stage:
    """Makes one stage of several, so that nothing of whole frames is kept between them."""

    def run(x: Tensor) -> Tensor:
        for stage in stages:
            x = stage.run(x)
        return x

    border, scale = 0, 1
    for stage in reversed(stages):
        border = -(-border // stage.scale) + cast(int, stage.border)
        scale *= stage.scale
    return _Stage(run, border, scale, stages[0].pixels)


class _Recomputed(torch.autograd.Function):
    """Runs a stage tile by tile without keeping activations; the backward pass runs every tile again.

    One tile's activations are alive at a time, and the gradient is summed in place, which checkpointing of the
    single tiles would not give.
    """

    @staticmethod
    def forward(ctx, x: Tensor, stage: _Stage, tile: int | None) -> Tensor:
        ctx.stage, ctx.tile = stage, tile
        ctx.save_for_backward(x)
        pieces = _tiles(x, stage, tile)
        if len(pieces) == 1:
            return stage.run(x)
        out: Tensor | None = None
        for source, crop, target in pieces:
            part = stage.run(x[source])
            if out is None:
                height, width = (stage.scale * side for side in x.shape[3:])
                out = part.new_empty(*part.shape[:3], height, width)
            out[target] = part[crop]
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), stage, (grad,) = ctx.saved_tensors, ctx.stage, grads
        pieces = _tiles(x, stage, ctx.tile)
        total = torch.zeros_like(x) if len(pieces) > 1 else None
        for source, crop, target in pieces:
            part = x[source].detach().requires_grad_(True)
            with torch.enable_grad():
                out = stage.run(part)[crop]
            (part_grad,) = torch.autograd.grad(out, part, grad[target])
            if total is None:
                return part_grad, None, None
            total[source] += part_grad
        return cast(Tensor, total), None, None


_Index = tuple[EllipsisType, slice, slice]


def _tiles(x: Tensor, stage: _Stage, tile: int | None) -> list[tuple[_Index, ...]]:
    """Lists, for every tile, the index of its input, of what to keep of its output, and of where that goes."""
    height, width = x.shape[3:]
    if tile is None or stage.border is None:
        return [((..., slice(None), slice(None)),) * 3]
    side = max(1, tile // stage.pixels)
    rows, columns = (list(_spans(size, side, stage)) for size in (height, width))
    return [tuple((..., y, x) for y, x in zip(row, column, strict=True)) for row in rows for column in columns]


def _spans(size: int, side: int, stage: _Stage) -> Iterator[tuple[slice, slice, slice]]:
    scale, border = stage.scale, cast(int, stage.border)
    for start, end in pairwise([*range(0, size, side), size]):
        first = max(0, start - border)
        yield (
            slice(first, end + border),
            slice((start - first) * scale, (end - first) * scale),
            slice(start * scale, end * scale),
        )
