"""The teacher with everything it needs to roll out chosen micro-batches of a training run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflora.clips import Clips
from vflora.data.pipeline import TrainLoader
from vflora.data.schema import DataSet
from vflora.models.conditions import ConditionEncoder
from vflora.models.fast_teacher import harvested_sigmas
from vflora.prompts import prompt_maker
from vflora.settings import TrainSettings
from vflora.student import build_student
from vflora.teacher_source import Preparation, Prepared, Rollouts, drawn_prompts
from vflora.trajectories.plan import Plan
from vflora.trajectories.shards import Note, packed
from vflora.types import Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """One rollout, and which points of it training steps will look at.

    Attributes:
        prepared: the micro-batch.
        conditions: digests of prompt and picture of each sample.
        trajectory: all points that the teacher visited.
        points: steps of the schedule to keep, rising.
    """

    prepared: Prepared
    conditions: tuple[tuple[str, str], ...]
    trajectory: Trajectory
    points: tuple[int, ...]

    def packed(self, dtype: torch.dtype) -> list[tuple[Note, bytes]]:
        """Returns each sample as it goes to disk: its note, and its tensors as bytes."""
        batch, number, points = self.prepared.batch, self.prepared.number, list(self.points)
        latents, velocities = (t[points].cpu() for t in (self.trajectory.latents, self.trajectory.velocities))
        samples = []
        for place, (slot, key) in enumerate(zip(batch.slots, batch.keys, strict=True)):
            content, digest = packed(latents[:, place], velocities[:, place], dtype)
            prompt, conditions = self.prepared.prompts[place], self.conditions[place]
            samples.append((Note(number, slot, key, prompt, conditions, self.points, digest), content))
        return samples


class Guide:
    """Leads the teacher through the rollouts that one process has to make."""

    def __init__(
        self,
        teacher: Rollouts,
        encoder: ConditionEncoder,
        prepared: Iterator[Prepared],
        loader: TrainLoader,
        plan: Plan,
        batch_size: int,
    ):
        """Takes the parts; `load` builds them."""
        self._teacher, self._encoder, self._prepared = teacher, encoder, prepared
        self._loader, self._plan, self._batch_size = loader, plan, batch_size

    @classmethod
    def load(cls, settings: TrainSettings, dataset: DataSet, plan: Plan, parts: Sequence[range]) -> Guide:
        """Loads the models and opens the data.

        Args:
            settings: of the run; its batch is that of one process of the training.
            dataset: that it trains on.
            plan: how rollouts are counted.
            parts: the rollouts to make, rising.

        Raises:
            UserError: for whatever is wrong with settings, data or models.
        """
        model, seed, config = settings.model, settings.run.seed, settings.rollout
        device, dtype = model.torch_device(), model.torch_dtype()
        places = [plan.place(rollout) for part in parts for rollout in part]
        make_prompt = prompt_maker(settings.prompts)
        clips = Clips.load(settings, dataset)

        def exact_sigmas(rollout: int) -> Collection[float]:
            """The noise levels that are kept of a rollout, counted since this process began."""
            return harvested_sigmas(config, seed, plan.block(places[rollout][0]), clips.sigmas)

        logger.info("loading the transformer")
        denoiser, acceleration = build_student(settings, dtype, device)
        loader = TrainLoader(dataset, settings.data, seed=seed, places=places)
        prepared = Preparation(
            loader,
            [number for number, _ in places],
            prompts=drawn_prompts(make_prompt, seed),
            encoder=clips.encoder,
            lookahead=settings.prompts.condition_lookahead,
        )
        shape = clips.latent_shape(config.train_video_length)
        leader = acceleration.teacher(denoiser, exact_sigmas, guidance_scale=config.guidance_scale)
        teacher = Rollouts(leader, clips.encoder, config, clips.sigmas, shape, seed, device)
        return cls(teacher, clips.encoder, prepared, loader, plan, settings.data.batch_size)

    def rollouts(self) -> Iterator[Rollout]:
        """Makes the rollouts, one by one and in order."""
        for ready in self._prepared:
            step = self._plan.block(ready.number) * self._plan.reuse
            trajectory = self._teacher.trajectory(ready, step)
            pairs = zip(ready.prompts, ready.batch.images, strict=True)
            conditions = tuple(self._encoder.keys(prompt, image) for prompt, image in pairs)
            yield Rollout(ready, conditions, trajectory, self._points(step))

    def _points(self, step: int) -> tuple[int, ...]:
        levels: Tensor = self._teacher.sigmas
        kept = harvested_sigmas(self._teacher.config, self._teacher.seed, step // self._plan.reuse, levels)
        return tuple(index for index, sigma in enumerate(levels.tolist()) if sigma in kept)

    def bytes_per_rollout(self, dtype: torch.dtype) -> int:
        """Returns the most that a rollout can take on disk: points x (latents and velocity) of each sample."""
        config = self._teacher.config
        per_step = config.harvest_count + 1 + config.harvest_below
        points = min(per_step * self._plan.reuse, len(self._teacher.sigmas) - 1)
        values = torch.Size(self._teacher.latent_shape).numel()
        return 2 * points * values * dtype.itemsize * self._batch_size

    def close(self) -> None:
        """Ends the loader's workers."""
        self._loader.close()
