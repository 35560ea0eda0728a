"""Training batches with their conditions and teacher trajectories, one block for every `trajectory_reuse` steps."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vflora.config import RolloutConfig
from vflora.models.conditions import ConditionEncoder
from vflora.models.roles import Teacher
from vflora.random_streams import keyed_generator, keyed_noise
from vflora.rollout import points_for_block, rollout
from vflora.step_clock import StepClock
from vflora.types import Batch, Conditions, HarvestedTrajectory, Trajectory

PromptMaker = Callable[[str, torch.Generator], str]


@dataclass(frozen=True)
class Prepared:
    """One micro-batch before the teacher has seen it.

    Attributes:
        number: of the batch, counted over the run.
        batch: pictures and names.
        prompts: one per sample.
        conditions: on the device.
    """

    number: int
    batch: Batch
    prompts: tuple[str, ...]
    conditions: Conditions


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
    trajectory: Trajectory | HarvestedTrajectory
    number: int


class LessonSource(Protocol):
    """Where a training step gets its lessons: from the teacher, or from what it left on disk."""

    def batches_before(self, step: int) -> int:
        """Returns how many batches the steps before `step` have finished with: where a resumed run starts."""
        ...

    def lessons(self, step: int, clock: StepClock) -> list[Lesson]:
        """Returns the micro-batches of optimizer step `step`; steps must be asked for in order."""
        ...


def batches_before(step: int, config: RolloutConfig, accumulation: int) -> int:
    """Returns how many batches of a process the steps before `step` have finished with."""
    return step // config.trajectory_reuse * accumulation


def drawn_prompts(make_prompt: PromptMaker, seed: int) -> Callable[[int, Batch], tuple[str, ...]]:
    """Returns what makes the prompts of a batch from its number: keyed by slot, so that nothing else matters."""

    def prompts(number: int, batch: Batch) -> tuple[str, ...]:
        return tuple(
            make_prompt(name, keyed_generator(seed, "prompt", number, slot))
            for name, slot in zip(batch.characters, batch.slots, strict=True)
        )

    return prompts


class Preparation:
    """Batches with their prompts and conditions, encoded several at a time."""

    def __init__(
        self,
        batches: Iterator[Batch],
        numbers: Iterable[int],
        *,
        prompts: Callable[[int, Batch], tuple[str, ...]],
        encoder: ConditionEncoder,
        lookahead: int,
    ):
        """Takes where they come from.

        Args:
            batches: from the loader.
            numbers: of these batches; it ends behind the last of them.
            prompts: of a batch, by its number.
            encoder: prompts and pictures to conditions.
            lookahead: batches that are encoded in one go.
        """
        self._batches, self._numbers, self._prompts = batches, iter(numbers), prompts
        self._encoder, self._lookahead = encoder, lookahead
        self._queue: deque[tuple[int, Batch, tuple[str, ...]]] = deque()

    def __iter__(self) -> Iterator[Prepared]:
        return self

    def __next__(self) -> Prepared:
        """Returns the next batch."""
        if not self._queue:
            self._look_ahead()
        number, batch, prompts = self._queue.popleft()
        return Prepared(number, batch, prompts, self._encoder.encode(prompts, batch.images))

    def _look_ahead(self) -> None:
        for number in itertools.islice(self._numbers, self._lookahead):
            batch = next(self._batches)
            self._queue.append((number, batch, self._prompts(number, batch)))
        if not self._queue:
            raise StopIteration
        self._encoder.prepare(
            [prompt for _, _, prompts in self._queue for prompt in prompts],
            torch.cat([batch.images for _, batch, _ in self._queue]),
        )


@dataclass(frozen=True)
class Rollouts:
    """The teacher's way through prepared batches.

    Attributes:
        denoiser: whose base model is the teacher, or a quicker stand-in for it.
        encoder: for the conditions without a prompt, which guidance needs.
        config: of the rollout.
        sigmas: schedule [S + 1].
        latent_shape: C, T, H, W of one sample.
        seed: of the run.
        device: of the rollout.
    """

    denoiser: Teacher
    encoder: ConditionEncoder
    config: RolloutConfig
    sigmas: Tensor
    latent_shape: tuple[int, int, int, int]
    seed: int
    device: torch.device

    def trajectory(self, prepared: Prepared, step: int) -> Trajectory:
        """Rolls out as far as any of the steps that share the rollout of `step` will look."""
        batch, scale = prepared.batch, self.config.rollout_guidance_scale
        noise = torch.stack(
            [keyed_noise(self.latent_shape, self.seed, "noise", prepared.number, slot) for slot in batch.slots]
        ).to(self.device)
        with self.denoiser.teacher():
            return rollout(
                self.denoiser,
                prepared.conditions,
                noise,
                self.sigmas,
                points_for_block(self.config, self.sigmas, self.seed, step),
                guidance_scale=scale,
                unconditional=self.encoder.encode([""] * len(batch), batch.images) if scale != 1 else None,
            )


class SharedLessons:
    """Keeps the lessons of a block of steps while they share them."""

    def __init__(self, config: RolloutConfig, accumulation: int):
        """Takes how many steps share a rollout, and how many micro-batches a step has."""
        self._config, self._accumulation = config, accumulation
        self._block: int | None = None
        self._lessons: list[Lesson] = []

    def of_step(self, step: int, make: Callable[[], Lesson]) -> list[Lesson]:
        """Returns the lessons of `step`, made anew where a block begins."""
        block = step // self._config.trajectory_reuse
        if block != self._block:
            self._lessons = [make() for _ in range(self._accumulation)]
            self._block = block
        return self._lessons

    def batches_before(self, step: int) -> int:
        """As `LessonSource.batches_before`."""
        return batches_before(step, self._config, self._accumulation)


class TeacherSource:
    """Makes the lessons of a step by asking the teacher."""

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
        self._prepared = Preparation(
            batches,
            itertools.count(start_batch),
            prompts=drawn_prompts(make_prompt, seed),
            encoder=encoder,
            lookahead=lookahead,
        )
        self._rollouts = Rollouts(denoiser, encoder, config, sigmas, latent_shape, seed, device)
        self._shared = SharedLessons(config, accumulation)

    def batches_before(self, step: int) -> int:
        """As `LessonSource.batches_before`."""
        return self._shared.batches_before(step)

    def lessons(self, step: int, clock: StepClock) -> list[Lesson]:
        """As `LessonSource.lessons`."""
        return self._shared.of_step(step, lambda: self._next_lesson(step, clock))

    def _next_lesson(self, step: int, clock: StepClock) -> Lesson:
        with clock.part("data"):
            ready = next(self._prepared)
        with clock.part("rollout"):
            trajectory = self._rollouts.trajectory(ready, step)
        return Lesson(ready.batch, ready.prompts, ready.conditions, trajectory, ready.number)
