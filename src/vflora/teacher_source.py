"""Training batches with their conditions and teacher trajectories, one block for every `trajectory_reuse` steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vflora.config import RolloutConfig
from vflora.models.conditions import ConditionEncoder
from vflora.models.fast_teacher import Teacher
from vflora.random_streams import keyed_generator, keyed_noise
from vflora.rollout import points_for_block, rollout
from vflora.step_clock import StepClock
from vflora.types import Batch, Conditions, Trajectory

PromptMaker = Callable[[str, torch.Generator], str]


@dataclass(frozen=True)
class Lesson:
    """One micro-batch, ready to learn from.

    Attributes:
        batch: pictures and names.
        prompts: one per sample.
        conditions: on the device.
        trajectory: the teacher's.
        number: of the batch, counted over the run.
    """

    batch: Batch
    prompts: tuple[str, ...]
    conditions: Conditions
    trajectory: Trajectory
    number: int


def batches_before(step: int, config: RolloutConfig, accumulation: int) -> int:
    """Returns how many batches of a process the steps before `step` have finished with."""
    return step // config.trajectory_reuse * accumulation


class TeacherSource:
    """Makes the lessons of a step, and keeps them while steps share them."""

    def __init__(
        self,
        batches: Iterator[Batch],
        *,
        start_batch: int,
        make_prompt: PromptMaker,
        encoder: ConditionEncoder,
        denoiser: Teacher,
        config: RolloutConfig,
        sigmas: Tensor,
        latent_shape: tuple[int, int, int, int],
        accumulation: int,
        lookahead: int,
        seed: int,
        device: torch.device,
    ):
        """Takes everything a lesson is made of.

        Args:
            batches: from the loader, beginning with number `start_batch`.
            start_batch: batches used before this run began.
            make_prompt: turns a name into a prompt with a generator.
            encoder: prompts and pictures to conditions.
            denoiser: whose base model is the teacher, or a quicker stand-in for it.
            config: of the rollout.
            sigmas: schedule [S + 1].
            latent_shape: C, T, H, W of one sample.
            accumulation: micro-batches of a step.
            lookahead: batches that are encoded in one go.
            seed: of the run.
            device: of the rollout.
        """
        self._batches, self._make_prompt, self._encoder, self._denoiser = batches, make_prompt, encoder, denoiser
        self._config, self._sigmas, self._latent_shape = config, sigmas, latent_shape
        self._accumulation, self._lookahead, self._seed, self._device = accumulation, lookahead, seed, device
        self._queue: deque[tuple[int, Batch, tuple[str, ...]]] = deque()
        self._fetched = start_batch
        self._block: int | None = None
        self._lessons: list[Lesson] = []

    def batches_before(self, step: int) -> int:
        """Returns how many batches the steps before `step` have finished with: where a resumed run starts."""
        return batches_before(step, self._config, self._accumulation)

    def lessons(self, step: int, clock: StepClock) -> list[Lesson]:
        """Returns the micro-batches of optimizer step `step`; steps must be asked for in order."""
        block = step // self._config.trajectory_reuse
        if block != self._block:
            points = points_for_block(self._config, self._seed, step)
            self._lessons = [self._next_lesson(points, clock) for _ in range(self._accumulation)]
            self._block = block
        return self._lessons

    def _next_lesson(self, points: int, clock: StepClock) -> Lesson:
        with clock.part("data"):
            if not self._queue:
                self._look_ahead()
            number, batch, prompts = self._queue.popleft()
            conditions = self._encoder.encode(prompts, batch.images)
            noise = torch.stack(
                [keyed_noise(self._latent_shape, self._seed, "noise", number, slot) for slot in batch.slots]
            ).to(self._device)
        with clock.part("rollout"), self._denoiser.teacher():
            scale = self._config.rollout_guidance_scale
            trajectory = rollout(
                self._denoiser,
                conditions,
                noise,
                self._sigmas,
                points,
                guidance_scale=scale,
                unconditional=self._encoder.encode([""] * len(batch), batch.images) if scale != 1 else None,
            )
        return Lesson(batch, prompts, conditions, trajectory, number)

    def _look_ahead(self) -> None:
        fresh = []
        for _ in range(self._lookahead):
            batch, number = next(self._batches), self._fetched
            prompts = tuple(
                self._make_prompt(name, keyed_generator(self._seed, "prompt", number, slot))
                for name, slot in zip(batch.characters, batch.slots, strict=True)
            )
            fresh.append((number, batch, prompts))
            self._fetched += 1
        self._encoder.prepare(
            [prompt for _, _, prompts in fresh for prompt in prompts], torch.cat([b.images for _, b, _ in fresh])
        )
        self._queue.extend(fresh)
