"""What CUDA graphs of the transformer share: inputs at fixed addresses, and which graph fits a call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vflora.models.denoiser import Denoiser, TextMasks, need_masks, text_masks
from vflora.types import Conditions

KEPT = 64
"""Graphs that are kept: prompts differ in length, and every length is one."""


@dataclass(frozen=True)
class FixedInputs:
    """Inputs of `Denoiser.velocity` that stay where they are, for a graph to read.

    Attributes:
        latents: [B, C, T, H, W], fp32.
        sigma: [B], fp32.
        next_sigma: [B], fp32, or None.
        conditions: of the B samples; of the lengths of their texts only `masks` counts.
        masks: of the texts, see `text_masks`.
    """

    latents: Tensor
    sigma: Tensor
    next_sigma: Tensor | None
    conditions: Conditions
    masks: TextMasks

    @classmethod
    def like(cls, latents: Tensor, sigma: float, conditions: Conditions, next_sigma: float | None) -> FixedInputs:
        """Copies a call's inputs to addresses of their own."""
        level = torch.full((len(latents),), sigma, dtype=torch.float32, device=latents.device)
        named = {field.name: getattr(conditions, field.name) for field in fields(conditions)}
        own = replace(conditions, **{name: v.clone() for name, v in named.items() if isinstance(v, Tensor)})
        following = None if next_sigma is None else torch.full_like(level, next_sigma)
        return cls(latents.clone(), level, following, own, text_masks(conditions))

    def load(self, latents: Tensor, sigma: float, conditions: Conditions, next_sigma: float | None) -> None:
        """Overwrites them with those of another call of the same shapes."""
        self.latents.copy_(latents)
        self.sigma.fill_(sigma)
        if self.next_sigma is not None:
            self.next_sigma.fill_(next_sigma or 0.0)
        for target, source in zip(_tensors(self.conditions), _tensors(conditions), strict=True):
            target.copy_(source)
        for target, source in zip(self.masks, text_masks(conditions), strict=True):
            if target is not None and source is not None:
                target.copy_(source)

    def velocity(self, denoiser: Denoiser) -> Tensor:
        """Returns the velocity that `denoiser` predicts for them, [B, C, T, H, W]."""
        return denoiser.velocity(
            self.latents, self.sigma, self.conditions, next_sigma=self.next_sigma, masks=self.masks
        )


def shapes(latents: Tensor, conditions: Conditions, next_sigma: float | None) -> tuple[Hashable, ...]:
    """Returns what calls that one graph can serve have in common: shapes, and which texts need a mask."""
    of_tensors = (tuple(tensor.shape) for tensor in (latents, *_tensors(conditions)))
    return (*of_tensors, next_sigma is None, *need_masks(conditions))


def _tensors(conditions: Conditions) -> list[Tensor]:
    values = (getattr(conditions, field.name) for field in fields(conditions))
    return [value for value in values if isinstance(value, Tensor)]


class Recorder:
    """Records graphs into one pool of memory: of those graphs none may run while another is half done."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Records the work that is given to the accelerator inside, instead of doing it.

        As `torch.cuda.graph`, without its emptying of caches, which every new length of a prompt would pay for, and
        without its ban on what other threads do meanwhile: loaders copy batches.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        stream = self._own_stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Gives the work inside to the stream that records, in order with what comes before and after.

        Autograd brings a parameter's gradient to the stream on which the parameter was used first, and remembers
        that stream as long as any pass is alive that used it. A plain pass elsewhere would tie a recorded one to it.
        """
        outside, stream = torch.cuda.current_stream(), self._own_stream()
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            yield
        outside.wait_stream(stream)

    def _own_stream(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()  # libraries keep a workspace for every stream they meet
        return self._stream


class _Releasable(Protocol):
    def release(self) -> None: ...


R = TypeVar("R", bound=_Releasable)


class Recordings(Generic[R]):
    """Recordings by what calls have in common; the first call of a kind is never recorded, the second is.

    What has to be compiled, and the plans that libraries make for a new shape, come with the first call.
    """

    def __init__(self, kept: int = KEPT):
        """Takes how many to keep; the one that was used longest ago goes first."""
        self._kept = kept
        self._seen: set[Hashable] = set()
        self._recorded: OrderedDict[Hashable, R] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recorded)

    def find(self, key: Hashable, record: Callable[[], R]) -> R | None:
        """Returns the recording for `key`, made by `record` at the second call; None at the first."""
        if key not in self._seen:
            self._seen.add(key)
            return None
        if key not in self._recorded:
            while len(self._recorded) >= self._kept:
                self._recorded.popitem(last=False)[1].release()
            self._recorded[key] = record()
        self._recorded.move_to_end(key)
        return self._recorded[key]
