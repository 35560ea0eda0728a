"""Decoding with gradients, as little of it as needed, and encoding the first frame.

The decoder is causal in time: the first k latent frames give exactly the first 4 (k - 1) + 1 frames of the whole
decode, so a loss that looks at early frames does not pay for late ones. Its attention is causal by frame and sits
only in the mid block at latent resolution; everything after it is local, so the rest can be computed in spatial
tiles that begin with a border wide enough for their convolutions, and come out as if there were no tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15AttnBlock,
)
from torch import Tensor

from vflora.distributed.strips import Strips
from vflora.models.decoder_stages import Margins, decoder_stages


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
    whole_frames, local = decoder_stages(vae.decoder, recompute=recompute, tile=tile)

    def choose(video: Tensor) -> Tensor:
        if frames is None or wanted.ndim == 1:
            return video if frames is None else video[:, :, wanted]
        index = wanted[:, None, :, None, None].expand(-1, video.shape[1], -1, *video.shape[3:])
        return video.gather(2, index)

    x = unscaled
    for stage in whole_frames:
        x = stage.run(x, Margins())
    strip = strips and strips.strip(x, cast(int, local.border))
    if strips is None or strip is None:
        return choose(local.run(x, Margins())).float()
    part = local.run(strips.cut(x, strip), Margins.along(strip.dim, strip.before, strip.after))
    return strips.join(choose(part), strip, local.scale).float()


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
