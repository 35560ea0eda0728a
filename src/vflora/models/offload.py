"""Frozen weights in main memory, two blocks at a time on the accelerator. Exact, and overlapped with the computing."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch import Tensor, nn

_ALIGNMENT = 256  # bytes; compiled kernels read whole vectors


class BlockOffload:
    """Brings each block's frozen weights in just before it runs, while the block before it computes.

    The LoRA stays on the accelerator. Every block must be recomputed in the backward pass: what a forward pass keeps
    would refer to weights that have been overwritten since.
    """

    def __init__(self, transformer: HunyuanVideo15Transformer3DModel, device: torch.device):
        """Moves the blocks' frozen weights to (page-locked) main memory and hooks the blocks, in place."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks = [_Packed(block, pin=self._stream is not None) for block in transformer.transformer_blocks]
        size = max(packed.host.numel() for packed in self._blocks)
        slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._slots = [(slot, [packed.views(slot) for packed in self._blocks]) for slot in slots]
        self._resident: list[int | None] = [None, None]
        self._arrivals: list[Any] = [None, None]
        self._last = -1
        for index, block in enumerate(transformer.transformer_blocks):
            block.register_forward_pre_hook(self._before(index))

    def _before(self, index: int):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if index not in self._resident:
                self._bring(index, slot=0)
            slot = self._resident.index(index)
            if self._stream is not None:
                torch.cuda.current_stream().wait_event(self._arrivals[slot])
            self._bring(self._guess_next(index), slot=1 - slot)
            self._last = index

        return hook

    def _guess_next(self, index: int) -> int:
        """Guesses which block runs after this one; a wrong guess costs time, nothing else."""
        end = len(self._blocks) - 1
        backward = torch.is_grad_enabled() and (index == end or index < self._last)
        if backward:
            return max(0, index - 1)
        return index + 1 if index < end else 0

    def _bring(self, index: int, slot: int) -> None:
        """Starts copying a block in, unless it is there. The copy waits for all work that is queued by now."""
        if index in self._resident:
            return
        packed = self._blocks[index]
        buffer, views = self._slots[slot]
        target = buffer[: packed.host.numel()]
        if self._stream is None:
            target.copy_(packed.host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                target.copy_(packed.host, non_blocking=True)
                self._arrivals[slot] = self._stream.record_event()
        for tensor, view in zip(packed.tensors, views[index], strict=True):
            tensor.data = view
        self._resident[slot] = index


class _Packed:
    """One block's frozen tensors, end to end in one host buffer."""

    def __init__(self, block: nn.Module, *, pin: bool):
        frozen = [p for p in block.parameters() if not p.requires_grad]
        self.tensors = [*frozen, *block.buffers()]
        padded = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in self.tensors]
        self._offsets = [0, *accumulate(padded)]
        self.host = torch.empty(self._offsets[-1], dtype=torch.uint8, pin_memory=pin)
        for tensor, view in zip(self.tensors, self.views(self.host), strict=True):
            view.copy_(tensor.detach())
            tensor.data = view

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns the tensors as parts of `buffer`."""
        return [
            buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(self.tensors, self._offsets, strict=False)
        ]
