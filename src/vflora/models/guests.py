"""Frozen models that are needed now and then: in main memory, and on the accelerator only while they work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn

from vflora.devices import has_room
from vflora.models.offload import BlockOffload

logger = logging.getLogger(__name__)

_WORK_BYTES = 1 << 30  # for what a guest computes; a prompt of 1,000 tokens takes a fifth of that


class Guests:
    """Lets models visit the accelerator: whole where there is room for them, else one layer after the other.

    The numbers are the same either way. Layer by layer every prompt brings all weights of the text encoder (14 GB) over
    again, but only 2 GB are there at a time: the embedding of words, which stays, and two layers. A model that once had
    no room comes in layers ever after.
    """

    def __init__(self, device: torch.device, *, once: bool = False):
        """Takes the device to be visited.

        Args:
            device: where guests work.
            once: they come once and are gone for good: they leave without their weights, which takes no time, and what
                comes in layers is not page-locked, which would quicken later visits and is memory that PyTorch keeps.
        """
        self._device, self._once = device, once
        self._layered: dict[nn.Module, BlockOffload] = {}

    @contextmanager
    def visit(self, *models: nn.Module) -> Iterator[None]:
        """Has the models ready on the device inside, and gives their memory there back afterwards."""
        with ExitStack() as departures:
            departures.callback(torch.cuda.empty_cache)  # when all have left
            for model in models:
                departures.callback(self._send_back, model)
                self._bring(model)
            yield

    def _bring(self, model: nn.Module) -> None:
        size = _bytes(model)
        if model not in self._layered and has_room(self._device, size + _WORK_BYTES):
            with suppress(torch.OutOfMemoryError):  # what is free may be in pieces
                model.to(self._device)
                return
            model.to("cpu")
            torch.cuda.empty_cache()
        if model not in self._layered:
            logger.info(
                "%s (%.1f GB) has no room beside the rest on the GPU and comes layer by layer, which takes longer",
                type(model).__name__,
                size / 1e9,
            )
            stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
            self._layered[model] = BlockOffload(model, max(stacks, key=_bytes), self._device, pin=not self._once)
        self._layered[model].begin()

    def _send_back(self, model: nn.Module) -> None:
        if model in self._layered:
            self._layered[model].end()
        model.to("meta" if self._once else "cpu")


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
