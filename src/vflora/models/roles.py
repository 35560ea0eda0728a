"""Who predicts velocities: what whoever learns, or leads a rollout, must be able to do."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch import Tensor

from vflora.types import Conditions

Level = TypeVar("Level", contravariant=True)
"""How noise levels are told: float, one for all samples, or Tensor, one for each."""


class Predictor(Protocol[Level]):
    """The denoiser, or a quicker stand-in for it."""

    def velocity(
        self, latents: Tensor, sigma: Level, conditions: Conditions, *, next_sigma: Level | None = None
    ) -> Tensor:
        """As `Denoiser.velocity`."""
        ...


Student = Predictor[float | Tensor]
"""Who learns."""


class Teacher(Predictor[float], Protocol):
    """Who can lead a rollout."""

    def teacher(self) -> AbstractContextManager[None]:
        """As `Denoiser.teacher`."""
        ...
