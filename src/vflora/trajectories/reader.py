"""Lessons from disk: what the teacher did is read, everything else is as in a run that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from vflora.config import RolloutConfig
from vflora.errors import UserError
from vflora.models.conditions import ConditionEncoder
from vflora.step_clock import StepClock
from vflora.teacher_source import Lesson, Preparation, Prepared, SharedLessons
from vflora.trajectories.folder import Trajectories
from vflora.trajectories.shards import StoredSample, read_shard
from vflora.types import Batch, HarvestedTrajectory

_OPEN_SHARDS = 16


class TrajectoryReader:
    """Makes the lessons of a step from what `vflora rollouts` wrote; takes the place of `TeacherSource`."""

    def __init__(
        self,
        trajectories: Trajectories,
        batches: Iterator[Batch],
        *,
        start_batch: int,
        steps: int,
        encoder: ConditionEncoder,
        config: RolloutConfig,
        sigmas: Tensor,
        latent_shape: tuple[int, int, int, int],
        lookahead: int,
        device: torch.device,
    ):
        """Takes the folder and the batches that go with it.

        Args:
            trajectories: what is there.
            batches: from the loader, beginning with number `start_batch`.
            start_batch: batches used before this run began.
            steps: of the whole run.
            encoder: prompts and pictures to conditions.
            config: of the rollouts.
            sigmas: schedule [S + 1].
            latent_shape: C, T, H, W of one sample.
            lookahead: batches that are encoded in one go.
            device: where the student computes.
        """
        self._trajectories = trajectories
        self._encoder, self._sigmas, self._latent_shape, self._device = encoder, sigmas, latent_shape, device
        self._samples_of = lru_cache(maxsize=_OPEN_SHARDS)(read_shard)
        # It ends with the run: beyond that, no prompt is known.
        numbers = range(start_batch, trajectories.plan.batches(steps))
        self._prepared = Preparation(batches, numbers, prompts=self._prompts, encoder=encoder, lookahead=lookahead)
        self._shared = SharedLessons(config, trajectories.plan.accumulation)

    def batches_before(self, step: int) -> int:
        """As `LessonSource.batches_before`."""
        return self._shared.batches_before(step)

    def lessons(self, step: int, clock: StepClock) -> list[Lesson]:
        """As `LessonSource.lessons`."""
        return self._shared.of_step(step, lambda: self._next_lesson(clock))

    def _next_lesson(self, clock: StepClock) -> Lesson:
        with clock.part("data"):
            ready = next(self._prepared)
            return Lesson(ready.batch, ready.prompts, ready.conditions, self._trajectory(ready), ready.number)

    def _prompts(self, number: int, batch: Batch) -> tuple[str, ...]:
        """The prompts that the teacher was given: a user's own builder may draw others the second time."""
        return tuple(self._stored(number, slot).note.prompt for slot in batch.slots)

    def _trajectory(self, ready: Prepared) -> HarvestedTrajectory:
        samples = [self._stored(ready.number, slot) for slot in ready.batch.slots]
        for sample, prompt, image in zip(samples, ready.prompts, ready.batch.images, strict=True):
            if self._encoder.keys(prompt, image) != sample.note.conditions:
                raise UserError(
                    f"batch {ready.number} in {sample.shard} was rolled out for another picture "
                    f"({sample.note.key}): use the data set and the model as they were, or roll out anew in another "
                    "--trajectory_dir."
                )
        tensors = [sample.tensors() for sample in samples]
        points = samples[0].note.points
        latents, velocities = (
            torch.stack([rows[name].float() for rows in tensors], dim=1).to(self._device)
            for name in ("latents", "velocities")
        )
        expected = (len(points), len(samples), *self._latent_shape)
        if latents.shape != expected or velocities.shape != expected:
            raise UserError(
                f"{samples[0].shard} holds latents of shape {tuple(latents.shape)} and this run's are {expected}: roll "
                "out anew in another --trajectory_dir."
            )
        return HarvestedTrajectory(self._sigmas, points, latents, velocities)

    def _stored(self, number: int, slot: int) -> StoredSample:
        processes = self._trajectories.plan.processes
        rollout = number * processes + slot * processes // self._trajectories.slots
        for shard, rollouts in self._trajectories.shards.items():
            if rollout in rollouts:
                found = self._samples_of(shard).get((number, slot))
                if found is not None:
                    return found
        raise UserError(
            f"the trajectory of batch {number}, sample {slot} is gone: run `vflora rollouts` again, it makes what is "
            "missing."
        )
