"""Clips of the base domain as the transformer sees them: latents, prompts and vision tokens, encoded once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15ImageToVideoPipeline
from torch import Tensor
from tqdm import trange
from transformers import SiglipVisionModel

from vflora.random_streams import keyed_generator, keyed_seed
from vflora.types import Conditions
from vflora.world.characters import Domain, Split, character_name
from vflora.world.renderer import render
from vflora.world.scenes import Scenes, sample_scenes
from vflora.world.scenes import prompts as prompts_of

_PROMPT_TOKENS = 64
_CHUNK = 256


class PromptBank:
    """Embeddings of prompts, each distinct one encoded once by the pipeline's own code; the last is the empty one."""

    def __init__(self, pipeline: HunyuanVideo15ImageToVideoPipeline, prompts: Sequence[str], device: torch.device):
        """Encodes the distinct ones of `prompts`, and the empty prompt for guidance."""
        distinct = [*dict.fromkeys(prompts), ""]
        self.index = {prompt: row for row, prompt in enumerate(distinct)}
        pipeline.tokenizer_max_length = _PROMPT_TOKENS
        pipeline.text_encoder.to(device)
        pipeline.text_encoder_2.to(device)
        embeds, lengths = [], []
        with torch.no_grad():
            for start in range(0, len(distinct), _CHUNK):
                texts = distinct[start : start + _CHUNK]
                encoded, mask, glyphs, _ = pipeline.encode_prompt(
                    texts, device=device, dtype=torch.float32, batch_size=len(texts)
                )
                embeds.append(encoded)
                lengths.append(mask.sum(1).long())
                self._glyph_width = glyphs.shape[2]
        self.embeds, self.lengths = torch.cat(embeds), torch.cat(lengths).cpu()
        if int(self.lengths.max()) >= _PROMPT_TOKENS:
            raise RuntimeError(f"a prompt of the world has {_PROMPT_TOKENS} tokens or more, and would be cut")

    @property
    def empty(self) -> int:
        """Row of the empty prompt."""
        return len(self.lengths) - 1

    def conditions(self, rows: Tensor, vision: Tensor, first_frame: Tensor) -> Conditions:
        """Puts together the conditions of B samples; prompts of one length need no mask later.

        Args:
            rows: of the prompts [B], on the CPU.
            vision: SigLIP tokens [B, N, C].
            first_frame: scaled latents [B, C, 1, H, W].
        """
        lengths = tuple(self.lengths[rows].tolist())
        device = self.embeds.device
        return Conditions(
            prompt_embeds=self.embeds[rows.to(device), : max(lengths)],
            prompt_lengths=lengths,
            prompt_embeds_2=torch.zeros(len(rows), 0, self._glyph_width, device=device),
            prompt_lengths_2=(0,) * len(rows),
            image_embeds=vision.float(),
            first_frame=first_frame.float(),
        )


@torch.no_grad()
def encode_clips(vae: AutoencoderKLHunyuanVideo15, video: Tensor) -> Tensor:
    """Encodes [B, 3, F, H, W] in [-1, 1] to scaled latents, fp32; its first latent frame is that of frame 0 alone."""
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        modes = vae.encode(video).latent_dist.mode()
    return modes.float() * vae.config.scaling_factor


@torch.no_grad()
def encode_vision(encoder: SiglipVisionModel, frame: Tensor) -> Tensor:
    """Encodes first frames [B, 3, H, W] in [-1, 1], of SigLIP's own size: its processor maps pixels to just that."""
    return encoder(pixel_values=frame).last_hidden_state


def as_stored(video: Tensor) -> Tensor:
    """Rounds [-1, 1] to the 256 values that pictures have."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _captions(scenes: Scenes) -> list[str]:
    return [f"a {character_name(character, domain=scenes.domain)}." for character in scenes.character.tolist()]


class LatentPool:
    """Clips of one domain and split, drawn in batches whose prompts are of one length."""

    def __init__(
        self,
        count: int,
        pipeline: HunyuanVideo15ImageToVideoPipeline,
        *,
        frames: int,
        size: int,
        device: torch.device,
        seed: int,
        domain: Domain = "geometric",
        splits: Sequence[Split] = ("train",),
        still: bool = False,
    ) -> None:
        """Renders and encodes `count` clips with the pipeline's VAE and encoders, which move to `device`.

        Of several `splits` each has its turn, 256 clips at a time.

        With `still` every clip is its first frame, repeated, and its caption names the character and no motion.
        """
        vae, image_encoder = pipeline.vae.to(device), pipeline.image_encoder.to(device)
        latents, vision, texts = [], [], []
        for chunk in trange(-(-count // _CHUNK), desc="rendering and encoding clips", delay=2):
            scenes = sample_scenes(
                min(_CHUNK, count - chunk * _CHUNK),
                domain=domain,
                split=splits[chunk % len(splits)],
                generator=keyed_generator(seed, "base clips", chunk),
                frames=frames,
            )
            video = as_stored(render(scenes, size=size, device=device).video)
            if still:
                video = video[:, :, :1].expand_as(video)
            latents.append(encode_clips(vae, video).bfloat16())
            vision.append(encode_vision(image_encoder, video[:, :, 0]).bfloat16())
            texts += _captions(scenes) if still else prompts_of(scenes)
        self._latents, self._vision = torch.cat(latents), torch.cat(vision)
        self.bank = PromptBank(pipeline, texts, device)
        self._prompts = torch.tensor([self.bank.index[text] for text in texts])
        of_clip = self.bank.lengths[self._prompts]
        lengths, counts = of_clip.unique(return_counts=True)
        self._groups = [torch.nonzero(of_clip == length)[:, 0] for length in lengths]
        self._shares = counts.double() / len(texts)
        self._generator = torch.Generator().manual_seed(keyed_seed(seed, "draw latents"))

    def __len__(self) -> int:
        return len(self._latents)

    def draw(self, count: int, *, blank: bool) -> tuple[Tensor, Conditions]:
        """Draws clips.

        Args:
            count: how many.
            blank: replace all prompts by the empty one, for classifier-free guidance.

        Returns:
            Clean latents [B, C, T, H, W], fp32, and their conditions.
        """
        group = self._groups[int(torch.multinomial(self._shares, 1, generator=self._generator))]
        rows = group[torch.randint(len(group), (count,), generator=self._generator)]
        prompts = torch.full_like(rows, self.bank.empty) if blank else self._prompts[rows]
        there = rows.to(self._latents.device, non_blocking=True)
        clean = self._latents[there].float()
        return clean, self.bank.conditions(prompts, self._vision[there], clean[:, :, :1])
