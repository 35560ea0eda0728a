"""Training batches with their conditions and teacher trajectories, one block for every `trajectory_reuse` steps."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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

NO_PROMPT = ""
"""What guidance leads away from."""


@dataclass(frozen=True)
class Drawn:
    """One micro-batch before anything of it is encoded.

    Attributes:
        number: of the batch, counted over the run.
        batch: pictures and names.
        prompts: one per sample.
    """

    number: int
    batch: Batch
    prompts: tuple[str, ...]


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


def drawn_together(
    batches: Iterator[Batch],
    numbers: Iterable[int],
    *,
    prompts: Callable[[int, Batch], tuple[str, ...]],
    lookahead: int,
) -> Iterator[list[Drawn]]:
    """Yields batches with their prompts, as many at a time as are encoded in one go.

    Args:
        batches: from the loader.
        numbers: of these batches; it ends behind the last of them.
        prompts: of a batch, by its number.
        lookahead: batches of a go; the last one may have fewer.
    """
    numbers = iter(numbers)
    while True:
        # Numbers first: where they end, no further batch is asked for.
        numbered = zip(itertools.islice(numbers, lookahead), batches, strict=False)
        together = [Drawn(number, batch, prompts(number, batch)) for number, batch in numbered]
        if not together:
            return
        yield together


def asked_by(together: Sequence[Drawn]) -> tuple[list[str], Tensor]:
    """Returns what one or more batches ask the encoder for: N prompts, and pictures, uint8 [N, 3, H, W]."""
    prompts = [prompt for drawn in together for prompt in drawn.prompts]
    return prompts, torch.cat([drawn.batch.images for drawn in together])


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
        self._goes = drawn_together(batches, numbers, prompts=prompts, lookahead=lookahead)
        self._encoder = encoder
        self._queue: deque[Drawn] = deque()

    def __iter__(self) -> Iterator[Prepared]:
        return self

    def __next__(self) -> Prepared:
        """Returns the next batch."""
        if not self._queue:
            self._queue.extend(next(self._goes))
            self._encoder.prepare(*asked_by(self._queue))
        drawn = self._queue.popleft()
        conditions = self._encoder.encode(drawn.prompts, drawn.batch.images)
        return Prepared(drawn.number, drawn.batch, drawn.prompts, conditions)


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
        batch, scale = prepared.batch, self.config.guidance_scale
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
                unconditional=self.encoder.encode([NO_PROMPT] * len(batch), batch.images) if scale != 1 else None,
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
        end_batch: int | None = None,
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
            end_batch: where the run ends, so that nothing beyond is encoded; None where that is not known.
        """
        numbers = itertools.count(start_batch) if end_batch is None else range(start_batch, end_batch)
        self._prepared = Preparation(
            batches,
            numbers,
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
