"""One training step: the method on a page.

A frozen teacher rolls out from noise. The student, the same weights with a LoRA, learns to agree with it at a few
harvested points: motion, camera and background survive. At a deep one of them, where little noise is left, the
student's clean estimate is decoded and its frames are compared with a picture of the character: the character stays
itself.

    L = L_distill + lambda * L_id
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vflora.errors import NonFiniteError
from vflora.flow import clean_estimate
from vflora.identity_term import IdentityGradient, IdentityTerm
from vflora.losses import distillation_loss
from vflora.models.roles import Student
from vflora.step_clock import StepClock
from vflora.types import Conditions, LossReport, Point


@dataclass(frozen=True)
class StepInputs:
    """What one micro-batch of a step works on.

    Attributes:
        conditions: of B samples.
        points: harvested points of their teacher trajectory.
        deep: place among them of the deep one, where identity is judged.
        anchors: pictures of the characters, uint8 [B, 3, H, W].
        distill_weight: of the distillation loss, 1 in the recipe.
        identity_weight: lambda; 0 skips the identity loss.
        key: of the random choice of frames.
    """

    conditions: Conditions
    points: Sequence[Point]
    deep: int
    anchors: Tensor
    identity_weight: float
    key: tuple[int | str, ...]
    distill_weight: float = 1.0


def training_step(
    student: Student,
    identity: IdentityTerm,
    inputs: StepInputs,
    *,
    scale: float,
    clock: StepClock,
    is_finite: Callable[[float], bool] = math.isfinite,
    keep_graph: bool = False,
) -> LossReport:
    """Adds the gradient of `scale` times the loss to the LoRA's gradients.

    The identity gradient comes in two stages. First the loss is carried back to the detached estimate; then it joins
    the distillation loss of the deep point as one linear term, and both go through the student together. That is
    the same gradient as in one piece, without the decoder's and the student's graphs ever coexisting. `keep_graph`
    lets them coexist instead: more memory, and one forward pass of the student fewer.

    `is_finite` is asked about every part of the loss; with several processes it is where they agree to stop.

    Raises:
        NonFiniteError: if a part of the loss is not finite.
    """
    deep = inputs.points[inputs.deep]
    judged = kept = None
    if inputs.identity_weight > 0:
        with clock.part("identity"):
            with torch.set_grad_enabled(keep_graph):
                velocity = _velocity(student, deep, inputs.conditions)
            kept = velocity if keep_graph else None
            estimate = clean_estimate(deep.latents, deep.sigma, velocity.detach())
            judged = identity.gradient(estimate, inputs.anchors, *inputs.key, clock=clock)
        _require_finite(is_finite, judged.loss, "the identity loss")

    errors: dict[float, float] = {}
    # A graph that is kept goes first, so that there is never a second one beside it.
    for point in inputs.points if kept is None else [deep, *(p for p in inputs.points if p is not deep)]:
        with clock.part("distillation"):
            velocity, kept = kept, None
            if velocity is None:
                velocity = _velocity(student, point, inputs.conditions)
            error = distillation_loss(velocity, point.teacher_velocity)
            loss = inputs.distill_weight * error / len(inputs.points)
            if judged is not None and point is deep:
                estimate = clean_estimate(point.latents, point.sigma, velocity)
                loss = loss + inputs.identity_weight * (judged.gradient * estimate).sum()
            (scale * loss).backward()
        _require_finite(is_finite, error.item(), f"the distillation loss at sigma {point.sigma:.3f}")
        errors[point.sigma] = error.item()
    return _report(inputs, [errors[point.sigma] for point in inputs.points], judged)


def _velocity(student: Student, point: Point, conditions: Conditions) -> Tensor:
    return student.velocity(point.latents, point.sigma, conditions, next_sigma=point.next_sigma)


def _require_finite(is_finite: Callable[[float], bool], value: float, part: str) -> None:
    if not is_finite(value):
        raise NonFiniteError(part)


def _report(inputs: StepInputs, errors: list[float], judged: IdentityGradient | None) -> LossReport:
    return LossReport(
        distill=sum(errors) / len(errors),
        identity=None if judged is None else judged.loss,
        distill_weight=inputs.distill_weight,
        weight=inputs.identity_weight,
        sigmas=tuple(point.sigma for point in inputs.points),
        distill_by_point=tuple(errors),
        cosines=None if judged is None else judged.cosines,
        frames=None if judged is None else judged.frames,
    )
