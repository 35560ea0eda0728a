"""How far a LoRA moves the model from its base, measured where it matters: on the base's own sampling path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vflora.evaluate import teacher_deviation
from vflora.flow import TIMESTEPS_PER_UNIT
from vflora.sampling import Pipeline, adapter_strength, default_steps, prepare_for_sampling


@dataclass(frozen=True)
class PathPoint:
    """One call of the transformer while the base model sampled.

    Attributes:
        sigma: noise level.
        inputs: what the transformer was given, tensors on the CPU.
        velocity: the base model's answer, fp32 on the CPU.
    """

    sigma: float
    inputs: dict[str, Any]
    velocity: Tensor


@contextmanager
def record_path(pipeline: Pipeline, points: int, steps: int | None) -> Iterator[list[PathPoint]]:
    """Inside, sampling leaves `points` evenly spaced calls of the transformer, with the prompt, in the list.

    Args:
        pipeline: that will sample one video.
        points: how many calls to keep; all, if the schedule is shorter.
        steps: of the schedule; None for what the checkpoint was made for.
    """
    prepare_for_sampling(pipeline)  # its hooks have to run before the one here
    length = steps or default_steps(pipeline)
    wanted = set(torch.linspace(0, length - 1, min(points, length)).round().int().tolist())
    path: list[PathPoint] = []
    seen: list[float] = []

    def keep(_module: torch.nn.Module, _args: tuple, inputs: dict[str, Any], output: tuple) -> None:
        timestep = float(inputs["timestep"].flatten()[0])
        if seen and seen[-1] == timestep:
            return  # the second call of a step is the one without the prompt
        seen.append(timestep)
        if len(seen) - 1 in wanted:
            path.append(PathPoint(timestep / TIMESTEPS_PER_UNIT, _moved(inputs, "cpu"), output[0].float().cpu()))

    handle = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield path
    finally:
        handle.remove()


@torch.no_grad()
def deviations_on(pipeline: Pipeline, path: list[PathPoint], scale: float) -> list[float]:
    """Returns the mean squared error of the velocity against the base's at every point, with LoRAs at `scale`."""
    device = pipeline._execution_device
    with adapter_strength(pipeline.transformer, scale):
        return [
            teacher_deviation(pipeline.transformer(**_moved(point.inputs, device))[0].cpu(), point.velocity)
            for point in path
        ]


def _moved(inputs: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
