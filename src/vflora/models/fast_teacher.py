"""A quicker way along the teacher's trajectory, exact wherever the student is going to be compared with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from vflora.config import RolloutConfig
from vflora.models.precision import Fp8Switch
from vflora.models.roles import Teacher
from vflora.rollout import harvest
from vflora.types import Conditions


def harvested_sigmas(config: RolloutConfig, seed: int, block: int, sigmas: Tensor) -> frozenset[float]:
    """Returns the noise levels at which any of the steps that share rollout `block` will look at it.

    Args:
        config: of the rollouts.
        seed: of the run.
        block: number of the rollout, counted over the run: step // trajectory_reuse.
        sigmas: the schedule [S + 1].
    """
    first = block * config.trajectory_reuse
    wanted: set[int] = set()
    for step in range(first, first + config.trajectory_reuse):
        wanted |= set(harvest(config, sigmas, seed, step).indices)
    return frozenset(sigmas[index].item() for index in wanted)


class FastTeacher:
    """Stands in for the denoiser where rollouts are made.

    At the noise levels that are harvested it asks the denoiser, in full precision. Between them it may multiply in
    float8, and it may skip points: a skipped velocity is extrapolated from the two computed before it, linearly in
    sigma, as a two-step Adams-Bashforth solver does (Hairer, Norsett & Wanner 1993, section III.1). The states that
    the harvest visits then differ a little from those of the plain rollout; the predictions there do not.
    """

    def __init__(
        self,
        denoiser: Teacher,
        exact_sigmas: Callable[[int], Collection[float]],
        *,
        switch: Fp8Switch,
        stride: int = 1,
    ):
        """Takes the model; a new rollout is one inside `teacher`, or at a higher noise level than the last call had.

        Args:
            denoiser: the model.
            exact_sigmas: the noise levels to be harvested from rollout 0, 1, 2, ... as this object counts them.
            switch: of the denoiser's layers, from `quantize_blocks`; one that no layer has changes nothing.
            stride: compute only every so many points between harvested ones; 1 computes all.
        """
        self._denoiser, self._exact_sigmas = denoiser, exact_sigmas
        self._switch, self._stride = switch, stride
        self._rollouts, self._last = 0, -math.inf
        self._exact: Collection[float] = ()
        self._computed: dict[bool, list[tuple[float, Tensor]]] = {}
        self._skips, self._skipped = False, 0

    def teacher(self) -> AbstractContextManager[None]:
        """As `Denoiser.teacher`; what comes inside is another rollout than what came before."""
        self._last = -math.inf  # one that ended at its first point began at the same noise level
        return self._denoiser.teacher()

    def velocity(
        self, latents: Tensor, sigma: float, conditions: Conditions, *, next_sigma: float | None = None
    ) -> Tensor:
        """Returns the velocity [B, C, T, H, W], fp32; arguments as for `Denoiser.velocity`."""
        if sigma > self._last:
            self._exact = self._exact_sigmas(self._rollouts)
            self._rollouts += 1
            self._computed, self._skipped = {False: [], True: []}, 0
        # The second call at a noise level is guidance's, for the blank prompt: it is skipped where the first one was.
        repeated, self._last = sigma == self._last, sigma
        computed = self._computed[repeated]
        if not repeated:
            self._skips = sigma not in self._exact and len(computed) == 2 and self._skipped < self._stride - 1
            self._skipped = self._skipped + 1 if self._skips else 0
        if self._skips:
            return self._extrapolated(computed, sigma)
        with nullcontext() if sigma in self._exact else self._switch.turned_on():
            velocity = self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        self._computed[repeated] = [*computed[-1:], (sigma, velocity)]
        return velocity

    @staticmethod
    def _extrapolated(computed: Sequence[tuple[float, Tensor]], sigma: float) -> Tensor:
        (before, earlier), (last, latest) = computed
        return latest + (sigma - last) / (last - before) * (latest - earlier)
