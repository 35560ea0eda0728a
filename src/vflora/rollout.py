"""Conditions -> Trajectory: the teacher's way from noise to the last point, and what is harvested from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vflora.config import RolloutConfig
from vflora.flow import euler_step
from vflora.random_streams import keyed_generator
from vflora.types import Conditions, Point, Trajectory

if TYPE_CHECKING:
    from vflora.models.denoiser import Denoiser
    from vflora.models.roles import Teacher


def rollout(
    denoiser: Teacher,
    conditions: Conditions,
    noise: Tensor,
    sigmas: Tensor,
    points: int,
    *,
    guidance_scale: float = 1.0,
    unconditional: Conditions | None = None,
) -> Trajectory:
    """Lets the model sample from noise and keeps every point on the way.

    Call it inside `denoiser.teacher()` for the teacher. With guidance the states move along the guided velocity
    (Ho & Salimans 2022, arXiv 2207.12598, eq. 6), because that is where people sample; the velocities kept are
    the conditional ones, because that is the branch the student learns.

    Args:
        denoiser: the model.
        conditions: of B samples.
        noise: starting point [B, C, T, H, W], fp32.
        sigmas: the schedule [S + 1].
        points: how many points to visit, at most S.
        guidance_scale: 1 is no guidance.
        unconditional: conditions without the prompt, needed for guidance.

    Returns:
        The trajectory with `points` points.
    """
    latents, kept_latents, kept_velocities = noise, [], []
    for index in range(points):
        sigma, next_sigma = sigmas[index].item(), sigmas[index + 1].item()
        velocity = denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        kept_latents.append(latents)
        kept_velocities.append(velocity)
        if index + 1 == points:
            break
        if guidance_scale != 1.0:
            if unconditional is None:
                raise ValueError("guidance needs the unconditional conditions")
            blank = denoiser.velocity(latents, sigma, unconditional, next_sigma=next_sigma)
            velocity = blank + guidance_scale * (velocity - blank)
        latents = euler_step(latents, velocity, sigma, next_sigma)
    return Trajectory(sigmas, torch.stack(kept_latents), torch.stack(kept_velocities))


def deep_index(config: RolloutConfig, sigmas: Tensor, seed: int, step: int) -> int:
    """Draws t_deep of an optimizer step: the point where identity is judged.

    One draw for the whole global batch, so that every process rolls out equally far.
    """
    allowed = deep_indices(config, sigmas)
    return allowed[int(torch.randint(len(allowed), (), generator=keyed_generator(seed, "deep", step)))]


def deep_indices(config: RolloutConfig, sigmas: Tensor) -> Sequence[int]:
    """Returns the points that t_deep may be: one at least.

    By noise level those are the points between `--id_sigma_low` and `--id_sigma_high`, or the nearest one where a
    schedule of few steps has none there.
    """
    steps = config.num_inference_steps
    if config.id_sigma_low is None or config.id_sigma_high is None:
        low = min(round(config.id_timestep_frac_low * steps), steps - 1)
        high = min(round(config.id_timestep_frac_high * steps), steps - 1)
        return range(low, high + 1)
    levels, low, high = sigmas[:-1].tolist(), config.id_sigma_low, config.id_sigma_high
    within = [index for index, level in enumerate(levels) if low <= level <= high]
    return within or [min(range(len(levels)), key=lambda index: max(low - levels[index], levels[index] - high))]


@dataclass(frozen=True)
class Harvest:
    """Which points of a rollout a step learns from.

    Attributes:
        above: indices before t_deep, rising.
        deep: t_deep, where identity is judged.
        below: indices after it, rising.
    """

    above: list[int]
    deep: int
    below: list[int]

    @property
    def indices(self) -> list[int]:
        """All of them, in the order of the rollout."""
        return [*self.above, self.deep, *self.below]


def harvest(config: RolloutConfig, sigmas: Tensor, seed: int, step: int) -> Harvest:
    """Draws what an optimizer step learns from; one draw for the whole global batch."""
    deep = deep_index(config, sigmas, seed, step)
    return Harvest(harvest_indices(config, deep, seed, step), deep, _below(config, deep, seed, step))


def points_for_block(config: RolloutConfig, sigmas: Tensor, seed: int, step: int) -> int:
    """Returns how many points the rollout that serves `step` must visit, for all the steps that share it."""
    first = step - step % config.trajectory_reuse
    return 1 + max(harvest(config, sigmas, seed, s).indices[-1] for s in range(first, first + config.trajectory_reuse))


def is_on_policy(config: RolloutConfig, seed: int, step: int) -> bool:
    """Draws whether t_deep of an optimizer step is reached by the student itself; one draw for the global batch."""
    return torch.rand((), generator=keyed_generator(seed, "on policy", step)).item() < config.id_on_policy


@torch.no_grad()
def on_policy_point(student: Denoiser, conditions: Conditions, sigmas: Tensor, start: Point, deep: int) -> Point:
    """Lets the student walk the last part of the way itself, and asks the teacher about where it arrives.

    A point of the teacher's trajectory is where the teacher would be; when the student samples, it is where its own
    steps have led it, and that is where its identity counts (on-policy, as in IPRO, arXiv 2510.14255).

    Args:
        student: with its adapters on.
        conditions: of B samples.
        sigmas: the schedule [S + 1].
        start: point of the teacher's trajectory where the student takes over.
        deep: index of the point where it arrives.

    Returns:
        The point at `deep` with the student's latents and the teacher's velocity there.
    """
    levels, latents = sigmas.tolist(), start.latents
    for index in range(start.index, deep):
        velocity = student.velocity(latents, levels[index], conditions, next_sigma=levels[index + 1])
        latents = euler_step(latents, velocity, levels[index], levels[index + 1])
    with student.teacher():
        velocity = student.velocity(latents, levels[deep], conditions, next_sigma=levels[deep + 1])
    return Point(deep, levels[deep], latents, velocity, levels[deep + 1])


def harvest_indices(config: RolloutConfig, deep: int, seed: int, step: int) -> list[int]:
    """Draws the points to distil besides t_deep: distinct, above it in noise, in the order of the rollout.

    `bracket` aims at 50 % and 25 % of the schedule, then at 75 %, 12.5 %, ... (halving on), each with jitter.
    """
    generator = keyed_generator(seed, "harvest", step)
    count = min(config.harvest_count, deep)
    if config.harvest_scheme == "random":
        return sorted(torch.randperm(deep, generator=generator)[:count].tolist())
    steps, chosen = config.num_inference_steps, []
    for order in range(1, count + 1):
        jitter = (2 * torch.rand((), generator=generator).item() - 1) * config.harvest_jitter_frac
        wanted = round((_halving(order) + jitter) * steps)
        free = [i for i in range(deep) if i not in chosen]
        chosen.append(min(free, key=lambda i: abs(i - wanted)))
    return sorted(chosen)


def _below(config: RolloutConfig, deep: int, seed: int, step: int) -> list[int]:
    """Draws the points to distil between t_deep and the end of the schedule, evenly; fewer where there are fewer."""
    left = config.num_inference_steps - 1 - deep
    chosen = torch.randperm(left, generator=keyed_generator(seed, "harvest below", step))[: config.harvest_below]
    return sorted(deep + 1 + index for index in chosen.tolist())


def _halving(order: int) -> float:
    """1 -> 0.5, 2 -> 0.25, 3 -> 0.75, 4 -> 0.125, ... (the van der Corput sequence)."""
    value, scale = 0.0, 0.5
    while order:
        value += scale * (order & 1)
        order >>= 1
        scale /= 2
    return value
