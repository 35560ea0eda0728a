"""The student's forward and backward pass as CUDA graphs: the same kernels, and a fraction of the Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from vflora.models.denoiser import Denoiser
from vflora.models.recompute import BlockRecompute
from vflora.models.replay import FixedInputs, Recorder, Recordings, shapes
from vflora.types import Conditions


class FixedGradients:
    """Gradients of parameters at fixed addresses, so that a graph can add to them."""

    def __init__(self, parameters: list[Parameter]):
        """Makes room for them, end to end."""
        self._parameters = parameters
        first = parameters[0]
        self._all = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        sizes = [p.numel() for p in parameters]
        self.views = [v.view(p.shape) for v, p in zip(self._all.split(sizes), parameters, strict=True)]

    def put_in_place(self) -> None:
        """Makes them the parameters' gradients, which keep the values that they have: zero where there are none."""
        started = any(p.grad is not None for p in self._parameters)
        if not started:  # the first pass of a step: one launch for all
            self._all.zero_()
        for parameter, view in zip(self._parameters, self.views, strict=True):
            if parameter.grad is view:
                continue
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            elif started:
                view.zero_()
            parameter.grad = view


@dataclass
class _Recorded:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: FixedInputs
    velocity: Tensor
    wanted: Tensor

    def release(self) -> None:
        self.forward.reset()
        self.backward.reset()


class GraphedStudent:
    """Stands in for the denoiser where the student learns, with the same velocities and the same gradients.

    As with the teacher, the first call with inputs of a new shape is a plain one and the second is recorded. What
    the forward pass keeps for the backward pass lies in the graphs' own memory, once for all of them: a forward pass
    must be followed by its backward pass before the next one.
    """

    def __init__(self, denoiser: Denoiser, recompute: BlockRecompute):
        """Takes the model, and who decides what is recomputed: before that is settled nothing is recorded."""
        self._denoiser, self._recompute = denoiser, recompute
        self._parameters = list(denoiser.lora_parameters().values())
        self._gradients: FixedGradients | None = None
        self.recordings: Recordings[_Recorded] = Recordings()
        self._recorder = Recorder()
        self._handle = torch.zeros((), requires_grad=True)  # gives replayed velocities a place in autograd's graph

    def velocity(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        conditions: Conditions,
        *,
        next_sigma: float | Tensor | None = None,
    ) -> Tensor:
        """Returns the velocity [B, C, T, H, W], fp32; arguments as for `Denoiser.velocity`."""
        can_record = latents.is_cuda and torch.is_grad_enabled()
        told = isinstance(sigma, Tensor) or isinstance(next_sigma, Tensor)  # levels of single samples
        if told or not can_record or not self._recompute.is_settled:
            return self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        recorded = self.recordings.find(
            shapes(latents, conditions, next_sigma),
            lambda: self._record(FixedInputs.like(latents, sigma, conditions, next_sigma)),
        )
        if recorded is None:
            # everything: the graphs' memory may hold what the blocks keep already
            with self._recompute.everything(), self._recorder.aside():
                velocity = self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
            velocity.record_stream(torch.cuda.current_stream())
            return velocity
        recorded.inputs.load(latents, sigma, conditions, next_sigma)
        return cast(Tensor, _Replayed.apply(self._handle, recorded, self._gradients))

    def _record(self, inputs: FixedInputs) -> _Recorded:
        self._gradients = self._gradients or FixedGradients(self._parameters)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self._recorder.recording(forward):
            velocity = inputs.velocity(self._denoiser)
        wanted = torch.zeros_like(velocity)
        with self._recorder.recording(backward):
            found = torch.autograd.grad(velocity, self._parameters, wanted, allow_unused=True)
            pairs = [(view, g) for view, g in zip(self._gradients.views, found, strict=True) if g is not None]
            # Many tensors to a launch, and no accumulation nodes of autograd, which insist on the stream of birth.
            torch._foreach_add_([view for view, _ in pairs], [gradient for _, gradient in pairs])
        return _Recorded(forward, backward, inputs, velocity.detach(), wanted)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: Tensor, recorded: _Recorded, gradients: FixedGradients) -> Tensor:
        ctx.recorded, ctx.gradients = recorded, gradients
        recorded.forward.replay()
        return recorded.velocity.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, None, None]:
        ctx.recorded.wanted.copy_(grads[0])
        ctx.gradients.put_in_place()
        ctx.recorded.backward.replay()
        return None, None, None
