"""Which blocks keep their activations for the backward pass, and which compute them again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from vflora.devices import available_memory, graph_segments
from vflora.models.speed_config import Recompute

logger = logging.getLogger(__name__)

_MARGIN = 0.08
"""Part of the accelerator's memory that is left alone, for fragments and for longer prompts."""


class BlockRecompute:
    """Recomputes the first blocks of a transformer and keeps the activations of the last ones.

    The result is the same whatever is kept. With `auto` the first optimizer step recomputes everything but one
    block, which shows what a block costs and how much memory the rest of a step needs; from then on as many blocks
    are kept as the remaining memory holds. On devices that cannot tell, everything is recomputed.
    """

    def __init__(self, transformer: HunyuanVideo15Transformer3DModel, mode: Recompute):
        """Takes over the transformer's gradient checkpointing, in place."""
        self._order = {id(block): i for i, block in enumerate(transformer.transformer_blocks)}
        self._undecided = mode == "auto"
        self._random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in transformer.modules())
        self._block_bytes, self._device = 0, torch.device("cuda")
        self.kept = len(self._order) if mode == "false" else 0
        if mode == "false":
            transformer.disable_gradient_checkpointing()
        else:
            transformer.enable_gradient_checkpointing(self._run)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        place = self._order.get(id(block))
        if place is None:  # the text refiner's blocks
            return self._checkpoint(block, *args)
        if self._undecided and place == len(self._order) - 1 and _on_cuda(args):
            self._device = args[0].device
            before = torch.cuda.memory_allocated(self._device)
            out = block(*args)
            self._block_bytes = max(self._block_bytes, torch.cuda.memory_allocated(self._device) - before)
            return out
        if place >= len(self._order) - self.kept:
            return block(*args)
        return self._checkpoint(block, *args)

    def _checkpoint(self, block: nn.Module, *args: Any) -> Any:
        # Without dropout there is no random state to bring back, which would take time and cannot be recorded.
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=self._random)

    @property
    def is_settled(self) -> bool:
        """Whether it is decided which blocks keep their activations."""
        return not self._undecided

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Inside, forward passes keep no block's activations, where blocks may be recomputed at all."""
        kept, self.kept = self.kept, 0
        try:
            yield
        finally:
            self.kept = kept

    def end_step(self, least: Callable[[int], int] = int) -> None:
        """Tells that an optimizer step is over; after the first one, `auto` decides.

        Processes that compute together must recompute the same blocks: `least` returns the smallest of their numbers.
        """
        if not self._undecided:
            return
        self._undecided = False
        if self._block_bytes == 0:
            return
        used = torch.cuda.max_memory_allocated(self._device)
        in_graphs = sum(segment["total_size"] for segment in graph_segments(self._device))
        spare = available_memory(self._device) * (1 - _MARGIN) - used - in_graphs
        self.kept = least(max(0, min(len(self._order), 1 + int(spare / self._block_bytes))))
        logger.info(
            "gradient checkpointing: %d of %d blocks keep their activations (%.2f GiB a block, %.1f GiB were free)",
            self.kept,
            len(self._order),
            self._block_bytes / 2**30,
            spare / 2**30,
        )


def _on_cuda(args: tuple[Any, ...]) -> bool:
    return isinstance(args[0], torch.Tensor) and args[0].is_cuda
