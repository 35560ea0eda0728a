"""The teacher's forward pass as a CUDA graph: the same kernels, without Python launching them one by one."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vflora.models.denoiser import Denoiser
from vflora.models.precision import Fp8Switch
from vflora.types import Conditions

_KEPT = 8  # graphs; prompts differ in length, and each length is one


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    latents: Tensor
    sigma: Tensor
    next_sigma: Tensor | None
    conditions: Conditions
    velocity: Tensor


class GraphedTeacher:
    """Stands in for the denoiser where rollouts are made, with bit-identical velocities.

    The first call with inputs of a new shape is a plain one, which compiles what is to be compiled; the second is
    recorded; later ones replay. Texts of unequal length in a batch need a mask, which is made on the CPU: those, and
    whatever does not run on CUDA, always go the plain way.
    """

    def __init__(self, denoiser: Denoiser, switch: Fp8Switch):
        """Takes the model, and the switch of its float8 layers."""
        self._denoiser, self._switch = denoiser, switch
        self._seen: set[tuple] = set()
        self._recorded: OrderedDict[tuple, _Recorded] = OrderedDict()
        self._pool: Any = None

    def teacher(self) -> AbstractContextManager[None]:
        """As `Denoiser.teacher`."""
        return self._denoiser.teacher()

    def velocity(
        self, latents: Tensor, sigma: float, conditions: Conditions, *, next_sigma: float | None = None
    ) -> Tensor:
        """Returns the velocity [B, C, T, H, W], fp32; arguments as for `Denoiser.velocity`."""
        if not latents.is_cuda or torch.is_grad_enabled() or _is_ragged(conditions):
            return self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        key = (
            *(tuple(tensor.shape) for tensor in (latents, *_tensors(conditions))),
            next_sigma is None,
            self._switch.on,
        )
        if key not in self._seen:
            self._seen.add(key)
            return self._denoiser.velocity(latents, sigma, conditions, next_sigma=next_sigma)
        if key not in self._recorded:
            while len(self._recorded) >= _KEPT:
                _, oldest = self._recorded.popitem(last=False)
                oldest.graph.reset()
            self._recorded[key] = self._record(latents, sigma, conditions, next_sigma)
        self._recorded.move_to_end(key)
        recorded = self._recorded[key]
        recorded.latents.copy_(latents)
        recorded.sigma.fill_(sigma)
        if recorded.next_sigma is not None:
            recorded.next_sigma.fill_(next_sigma or 0.0)
        for target, source in zip(_tensors(recorded.conditions), _tensors(conditions), strict=True):
            target.copy_(source)
        recorded.graph.replay()
        return recorded.velocity.clone()

    def _record(self, latents: Tensor, sigma: float, conditions: Conditions, next_sigma: float | None) -> _Recorded:
        batch, device = len(conditions), latents.device
        latents = latents.clone()
        level = torch.full((batch,), sigma, dtype=torch.float32, device=device)
        following = None if next_sigma is None else torch.full_like(level, next_sigma)
        named = {field.name: getattr(conditions, field.name) for field in fields(conditions)}
        own = replace(conditions, **{name: v.clone() for name, v in named.items() if isinstance(v, Tensor)})
        # One pool serves all graphs: none ever runs beside another, and results are copied out at once.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            velocity = self._denoiser.velocity(latents, level, own, next_sigma=following)
        return _Recorded(graph, latents, level, following, own, velocity)


def _tensors(conditions: Conditions) -> list[Tensor]:
    values = (getattr(conditions, field.name) for field in fields(conditions))
    return [value for value in values if isinstance(value, Tensor)]


def _is_ragged(conditions: Conditions) -> bool:
    return len(set(conditions.prompt_lengths)) > 1 or len(set(conditions.prompt_lengths_2)) > 1
