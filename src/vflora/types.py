"""The four records that carry the whole flow, and the legend of shapes.

Shape letters, used in every docstring of the package:

    B batch        F frames (4n+1)        T latent frames, (F-1)/4 + 1
    C channels     H W height and width (pixels or latents, as said)
    N tokens       P points of a trajectory        S steps of the sampling schedule

Sigmas run from 1 (noise) to 0 (clean): x_t = (1 - sigma) x0 + sigma noise, velocity = noise - x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Still images of characters, as they come from the shards.

    Attributes:
        images: reference images, uint8 [B, 3, H, W], RGB.
        anchors: images that the identity loss compares with, uint8 [B, 3, H, W]: another image of the same
            character where one was drawn, otherwise the reference itself.
        has_secondary: bool [B], where the anchor is another image.
        characters: canonical names, one per sample.
        keys: sample keys in the shards, one per sample.
        slots: place of each sample in the global batch; all noise is keyed by it, so that the number of
            processes changes nothing.
    """

    images: Tensor
    anchors: Tensor
    has_secondary: Tensor
    characters: tuple[str, ...]
    keys: tuple[str, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.characters)


@dataclass(frozen=True)
class Conditions:
    """What the transformer is told about a sample besides the noisy latents.

    Texts hold valid tokens first, then zeros up to the longest text of the batch. The lengths are Python
    numbers, so that nobody has to ask the accelerator which tokens count.

    Attributes:
        prompt_embeds: Qwen2.5-VL hidden states [B, N, C].
        prompt_lengths: valid tokens of each prompt.
        prompt_embeds_2: byT5 hidden states of quoted text [B, N2, C2]; N2 may be 0.
        prompt_lengths_2: valid tokens of each.
        image_embeds: SigLIP hidden states [B, N3, C3]; N3 is 0 for text to video.
        first_frame: latent of the reference image, scaled, fp32 [B, C, 1, H, W]; None for text to video.
    """

    prompt_embeds: Tensor
    prompt_lengths: tuple[int, ...]
    prompt_embeds_2: Tensor
    prompt_lengths_2: tuple[int, ...]
    image_embeds: Tensor
    first_frame: Tensor | None

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves every tensor to `device` and the embeddings to `dtype`; the first frame stays fp32."""
        return replace(
            self,
            prompt_embeds=self.prompt_embeds.to(device, dtype),
            prompt_embeds_2=self.prompt_embeds_2.to(device, dtype),
            image_embeds=self.image_embeds.to(device, dtype),
            first_frame=None if self.first_frame is None else self.first_frame.to(device),
        )

    def select(self, index: int) -> Self:
        """Returns the conditions of one sample, as a batch of one without padding."""
        rows = slice(index, index + 1)
        length, length_2 = self.prompt_lengths[index], self.prompt_lengths_2[index]
        return replace(
            self,
            prompt_embeds=self.prompt_embeds[rows, :length],
            prompt_lengths=(length,),
            prompt_embeds_2=self.prompt_embeds_2[rows, :length_2],
            prompt_lengths_2=(length_2,),
            image_embeds=self.image_embeds[rows],
            first_frame=None if self.first_frame is None else self.first_frame[rows],
        )

    @classmethod
    def stack(cls, rows: Sequence[Conditions]) -> Conditions:
        """Joins batches; shorter texts are padded with zeros."""
        frames = [row.first_frame for row in rows if row.first_frame is not None]
        return cls(
            prompt_embeds=_join_padded([row.prompt_embeds for row in rows]),
            prompt_lengths=tuple(n for row in rows for n in row.prompt_lengths),
            prompt_embeds_2=_join_padded([row.prompt_embeds_2 for row in rows]),
            prompt_lengths_2=tuple(n for row in rows for n in row.prompt_lengths_2),
            image_embeds=torch.cat([row.image_embeds for row in rows]),
            first_frame=torch.cat(frames) if frames else None,
        )


def _join_padded(texts: list[Tensor]) -> Tensor:
    longest = max(text.shape[1] for text in texts)
    return torch.cat([torch.nn.functional.pad(t, (0, 0, 0, longest - t.shape[1])) for t in texts])


@dataclass(frozen=True)
class Trajectory:
    """A teacher rollout, every point of it, from pure noise down to the last point asked for.

    Attributes:
        sigmas: the whole schedule [S + 1], from 1 to 0, fp32.
        latents: noisy latents before each step [P, B, C, T, H, W], fp32; P <= S.
        velocities: the teacher's predictions there, same shape, fp32.
    """

    sigmas: Tensor
    latents: Tensor
    velocities: Tensor

    def __len__(self) -> int:
        return self.latents.shape[0]

    def point(self, index: int) -> Point:
        """Returns the state before step `index`.

        Raises:
            IndexError: if the rollout stopped before that step.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"the rollout has points 0 to {len(self) - 1}, not {index}")
        return Point(
            index,
            float(self.sigmas[index]),
            self.latents[index],
            self.velocities[index],
            float(self.sigmas[index + 1]),
        )


@dataclass(frozen=True)
class HarvestedTrajectory:
    """What a teacher rollout leaves on disk: the points that training steps look at.

    Attributes:
        sigmas: the whole schedule [S + 1], from 1 to 0, fp32.
        indices: step of the schedule of each of P points, rising.
        latents: noisy latents there [P, B, C, T, H, W], fp32.
        velocities: the teacher's predictions there, same shape, fp32.
    """

    sigmas: Tensor
    indices: tuple[int, ...]
    latents: Tensor
    velocities: Tensor

    def point(self, index: int) -> Point:
        """Returns the state before step `index`.

        Raises:
            IndexError: if that point was not kept.
        """
        if index not in self.indices:
            raise IndexError(f"the points {self.indices} were kept, not {index}")
        place = self.indices.index(index)
        return Point(
            index,
            float(self.sigmas[index]),
            self.latents[place],
            self.velocities[place],
            float(self.sigmas[index + 1]),
        )


@dataclass(frozen=True)
class Point:
    """One point of a trajectory.

    Attributes:
        index: step of the schedule.
        sigma: noise level in [0, 1].
        latents: x_t [B, C, T, H, W], fp32.
        teacher_velocity: same shape, fp32.
        next_sigma: noise level after this step, which step-distilled transformers are told: their velocity is the
            mean over the step, so student and teacher must mean the same step.
    """

    index: int
    sigma: float
    latents: Tensor
    teacher_velocity: Tensor
    next_sigma: float = 0.0


@dataclass(frozen=True)
class LossReport:
    """Numbers of one step, for logs; nothing here carries a gradient.

    Attributes:
        distill: mean squared error between student and teacher velocity, averaged over the points.
        identity: mean of 1 - cosine over the sampled frames; None when this step had no identity term.
        weight: lambda of this step.
        distill_weight: of the distillation loss.
        sigmas: noise level of each distilled point.
        distill_by_point: the error at each of them.
        cosines: cosine of every sampled frame to its anchor [B, K]; None without an identity term.
        frames: frame index of each sampled frame [B, K]; None without an identity term.
    """

    distill: float
    identity: float | None
    weight: float
    sigmas: tuple[float, ...]
    distill_by_point: tuple[float, ...]
    cosines: Tensor | None
    frames: Tensor | None
    distill_weight: float = 1.0

    @property
    def total(self) -> float:
        """The objective: L_distill + lambda * L_id."""
        return self.distill_weight * self.distill + self.weight * (self.identity or 0.0)
