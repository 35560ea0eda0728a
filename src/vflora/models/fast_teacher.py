"""A quicker way along the teacher's trajectory, exact wherever the student is going to be compared with it."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from vflora.models.denoiser import Denoiser
from vflora.models.precision import Fp8Switch
from vflora.types import Conditions


class FastTeacher:
    """Stands in for the denoiser in one rollout.

    At the noise levels that are harvested it asks the denoiser, in full precision. Between them it may multiply in
    float8, and it may skip points: a skipped velocity is extrapolated from the two computed before it, linearly in
    sigma, as a two-step Adams-Bashforth solver does (Hairer, Norsett & Wanner 1993, section III.1). The states that
    the harvest visits then differ a little from those of the plain rollout; the predictions there do not.
    """

    def __init__(self, denoiser: Denoiser, exact_sigmas: Collection[float], *, switch: Fp8Switch, stride: int = 1):
        """Makes a teacher for one rollout from noise downwards.

        Args:
            denoiser: the model.
            exact_sigmas: noise levels that will be harvested, as the schedule has them.
            switch: of the denoiser's layers, from `quantize_blocks`; one that no layer has changes nothing.
            stride: compute only every so many points between harvested ones; 1 computes all.
        """
        self._denoiser, self._exact = denoiser, frozenset(exact_sigmas)
        self._switch, self._stride = switch, stride
        self._computed: list[tuple[float, Tensor]] = []
        self._skipped = 0

    def velocity(
        self, latents: Tensor, sigma: float, conditions: Conditions, *, next_sigma: float | None = None
    ) -> Tensor:
        """Returns the velocity [B, C, T, H, W], fp32; arguments as for `Denoiser.velocity`."""
        if sigma in self._exact:
            velocity = self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        elif len(self._computed) == 2 and self._skipped < self._stride - 1:
            self._skipped += 1
            return self._extrapolated(sigma)
        else:
            with self._switch.turned_on():
                velocity = self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        self._computed = [*self._computed[-1:], (sigma, velocity)]
        self._skipped = 0
        return velocity

    def _extrapolated(self, sigma: float) -> Tensor:
        (before, earlier), (last, latest) = self._computed
        return latest + (sigma - last) / (last - before) * (latest - earlier)
