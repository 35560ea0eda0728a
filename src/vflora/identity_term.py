"""The identity loss of a clean estimate, and its gradient with respect to that estimate alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLHunyuanVideo15
from torch import Tensor

from vflora.config import IdentityConfig
from vflora.data.images import to_signed
from vflora.distributed.strips import Strips
from vflora.losses import frame_buckets, identity_loss
from vflora.models.identity import IdentityEmbedder
from vflora.models.resizing import resize
from vflora.models.video_vae import decode_frames
from vflora.random_streams import keyed_generator
from vflora.step_clock import StepClock


@dataclass(frozen=True)
class IdentityGradient:
    """What the identity loss says about an estimate.

    Attributes:
        loss: mean of 1 - cosine.
        gradient: d loss / d x0 [B, C, T, H, W], fp32.
        cosines: of every sampled frame to its anchor [B, K], on the CPU.
        frames: frame index of each [B, K].
    """

    loss: float
    gradient: Tensor
    cosines: Tensor
    frames: Tensor


class IdentityTerm:
    """Decodes a few frames of an estimate, embeds them, and compares them with the anchors."""

    def __init__(
        self,
        config: IdentityConfig,
        vae: AutoencoderKLHunyuanVideo15,
        embedder: IdentityEmbedder,
        *,
        recompute: bool = True,
        tile: int | None = None,
        strips: Strips | None = None,
    ):
        """Takes the frozen VAE and embedder.

        Args:
            config: frame count, downsampling and margin.
            vae: decodes the estimate.
            embedder: DINOv3 with its projection head.
            recompute: whether the decoder's activations are computed again in the backward pass.
            tile: side of the decoder's tiles in pixels; None for whole frames.
            strips: processes that share a sample and so the decoding of it.
        """
        self.config, self.vae, self.embedder = config, vae, embedder
        self._recompute, self._tile, self._strips = recompute, tile, strips

    def gradient(
        self, clean: Tensor, anchors: Tensor, *key: int | str, clock: StepClock | None = None
    ) -> IdentityGradient:
        """Computes the loss and carries its gradient back to the estimate, no further.

        The decoder's graph lives and dies in here, so it never shares memory with the student's.

        Args:
            clean: estimated latents x0 [B, C, T, H, W], fp32, detached.
            anchors: uint8 [B, 3, H, W].
            key: of the random choice of frames.
            clock: told what part of the time the decoder takes, forward and backward.
        """
        clock = clock or StepClock(clean.device)
        clean = clean.detach().requires_grad_()
        frame_count = (clean.shape[2] - 1) * self.vae.temporal_compression_ratio + 1
        chosen = torch.tensor(frame_buckets(frame_count, self.config.id_num_frames, keyed_generator(*key)))
        with torch.enable_grad():
            with clock.part("decode"):
                pixels = decode_frames(
                    self.vae,
                    self._shrunk(clean),
                    chosen.tolist(),
                    checkpointed=self._recompute,
                    tile=self._tile,
                    strips=self._strips,
                )
            seen = pixels.detach().requires_grad_()
            frames = self.embedder.embed(seen.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clean), -1))
            loss, cosines = identity_loss(frames, self.embed_anchors(anchors), self.config.id_margin)
            (wanted,) = torch.autograd.grad(loss, seen)
            with clock.part("decode"):
                (gradient,) = torch.autograd.grad(pixels, clean, wanted)
        return IdentityGradient(loss.item(), gradient, cosines.cpu(), chosen.expand(len(clean), -1))

    @torch.no_grad()
    def embed_anchors(self, anchors: Tensor) -> Tensor:
        """Returns unit embeddings [B, D] of uint8 images [B, 3, H, W]."""
        device = next(self.vae.parameters()).device
        return self.embedder.embed(to_signed(anchors.to(device)))

    def _shrunk(self, latents: Tensor) -> Tensor:
        mode = self.config.id_decode_downsample_mode
        if mode == "false":
            return latents
        height, width = (max(1, round(n * self.config.id_decode_scale)) for n in latents.shape[-2:])
        return resize(latents, (height, width), mode)
