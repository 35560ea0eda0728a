"""The teacher's forward pass as a CUDA graph: the same kernels, without Python launching them one by one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vflora.models.denoiser import Denoiser
from vflora.models.precision import Fp8Switch
from vflora.models.replay import FixedInputs, Recorder, Recordings, shapes
from vflora.types import Conditions


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: FixedInputs
    velocity: Tensor

    def release(self) -> None:
        self.graph.reset()


class GraphedTeacher:
    """Stands in for the denoiser where rollouts are made, with bit-identical velocities.

    The first call with inputs of a new shape is a plain one, which compiles what is to be compiled; the second is
    recorded; later ones replay. What does not run on CUDA always goes the plain way.
    """

    def __init__(self, denoiser: Denoiser, switch: Fp8Switch):
        """Takes the model, and the switch of its float8 layers."""
        self._denoiser, self._switch = denoiser, switch
        self.recordings: Recordings[_Recorded] = Recordings()
        self._recorder = Recorder()

    def teacher(self) -> AbstractContextManager[None]:
        """As `Denoiser.teacher`."""
        return self._denoiser.teacher()

    def velocity(
        self, latents: Tensor, sigma: float, conditions: Conditions, *, next_sigma: float | None = None
    ) -> Tensor:
        """Returns the velocity [B, C, T, H, W], fp32; arguments as for `Denoiser.velocity`."""
        recorded = None
        if latents.is_cuda and not torch.is_grad_enabled():
            recorded = self.recordings.find(
                (shapes(latents, conditions, next_sigma), self._switch.on),
                lambda: self._record(FixedInputs.like(latents, sigma, conditions, next_sigma)),
            )
        if recorded is None:
            return self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        recorded.inputs.load(latents, sigma, conditions, next_sigma)
        recorded.graph.replay()
        return recorded.velocity.clone()

    def _record(self, inputs: FixedInputs) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        with self._recorder.recording(graph):
            velocity = inputs.velocity(self._denoiser)
        return _Recorded(graph, inputs, velocity)
