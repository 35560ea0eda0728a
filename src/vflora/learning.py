"""What one lesson does to the LoRA's gradients."""

from __future__ import annotations

from typing import Protocol

import torch

from vflora.distributed.processes import ALONE, World
from vflora.errors import NonFiniteError
from vflora.identity_term import IdentityTerm
from vflora.losses import identity_weight
from vflora.models.denoiser import Denoiser
from vflora.models.roles import Student
from vflora.recipe import StepInputs, training_step
from vflora.rollout import harvest, is_on_policy, on_policy_point
from vflora.settings import TrainSettings
from vflora.step_clock import StepClock
from vflora.teacher_source import Lesson
from vflora.types import LossReport, Point


class Learner(Protocol):
    """What learning needs of a run."""

    settings: TrainSettings
    denoiser: Denoiser
    student: Student
    identity: IdentityTerm


def learn(
    training: Learner,
    lesson: Lesson,
    step: int,
    micro: int,
    clock: StepClock,
    world: World = ALONE,
) -> LossReport:
    """Harvests the lesson's trajectory for this step and adds its gradient.

    Args:
        training: the run.
        lesson: one micro-batch.
        step: optimizer steps done.
        micro: number of the lesson within the step.
        clock: of the step.
        world: the processes, each with a lesson of its own.

    Raises:
        NonFiniteError: naming the part of the loss that is not finite on some process, and the step.
    """
    settings, config = training.settings, training.settings.identity
    above, deep, below = _points(training, lesson, step, clock)
    inputs = StepInputs(
        conditions=lesson.conditions,
        points=[*above, deep, *below],
        deep=len(above),
        anchors=lesson.batch.anchors,
        distill_weight=config.lambda_distill,
        identity_weight=identity_weight(
            step,
            peak=config.lambda_id,
            schedule=config.lambda_id_schedule,
            warmup_steps=config.lambda_id_warmup_steps,
            every_steps=config.id_every_steps,
        ),
        key=(settings.run.seed, "frames", step, micro),
    )
    if settings.lora.lora_dropout > 0:
        # The only global generator in the step: seeded per micro-batch, so that a resumed run drops the same.
        torch.manual_seed(settings.run.seed * 1_000_003 + step * 1_009 + micro + world.rank * 500_009)
    scale = 1 / settings.optimizer.gradient_accumulation_steps
    try:
        return training_step(
            training.student,
            training.identity,
            inputs,
            scale=scale,
            clock=clock,
            is_finite=world.all_finite,
            keep_graph=settings.speed.keep_student_graph,
        )
    except NonFiniteError as error:
        raise NonFiniteError(error.part, step + 1) from None


def _points(training: Learner, lesson: Lesson, step: int, clock: StepClock) -> tuple[list[Point], Point, list[Point]]:
    """Returns the points above t_deep, the one there, and those below."""
    config, seed, trajectory = training.settings.rollout, training.settings.run.seed, lesson.trajectory
    chosen = harvest(config, trajectory.sigmas, seed, step)
    above, below = ([trajectory.point(index) for index in part] for part in (chosen.above, chosen.below))
    if is_on_policy(config, seed, step):
        with clock.part("on_policy"):
            deep = on_policy_point(training.denoiser, lesson.conditions, trajectory.sigmas, above[-1], chosen.deep)
    else:
        deep = trajectory.point(chosen.deep)
    return above, deep, below
