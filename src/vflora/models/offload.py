"""Frozen weights in main memory, two blocks at a time on the accelerator. Exact, and overlapped with the computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_ALIGNMENT = 256  # bytes; compiled kernels read whole vectors
_PIECE = 1 << 31  # bytes


class BlockOffload:
    """Brings each block's frozen weights in just before it runs, while the block before it computes.

    What learns, as a LoRA does, stays on the accelerator. A block that is trained must be recomputed in the backward
    pass: what a forward pass keeps would refer to weights that have been overwritten since.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, device: torch.device, *, pin: bool = True):
        """Moves the blocks' frozen weights to main memory, in place; `begin` is next.

        Args:
            model: that runs the blocks one after the other.
            blocks: of it.
            device: where it computes.
            pin: page-lock that memory, for CUDA: only then do copies and computing overlap.
        """
        self._model, self._modules, self._device = model, blocks, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        parts = [_Frozen(block) for block in blocks]
        rooms = _host_rooms([part.size for part in parts], pin=pin and self._stream is not None)
        self._blocks = [_Packed(part, host) for part, host in zip(parts, rooms, strict=True)]
        self._slots: list[tuple[Tensor, list[list[Tensor]]]] = []
        self._hooks: list[RemovableHandle] = []
        self._resident: list[int | None] = [None, None]
        self._arrivals: list[Any] = [None, None]
        self._last = -1

    def begin(self) -> None:
        """Makes room for two blocks on the device, moves the rest of the model there, and hooks the blocks."""
        size = max(packed.host.numel() for packed in self._blocks)
        slots = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._slots = [(slot, [packed.views(slot) for packed in self._blocks]) for slot in slots]
        self._resident, self._last = [None, None], -1
        self._move_the_rest(self._device)
        for index, block in enumerate(self._modules):
            self._hooks.append(block.register_forward_pre_hook(self._before(index)))

    def end(self) -> None:
        """Moves the whole model to main memory and gives the room on the device back; `begin` may follow."""
        if self._stream is not None:  # a block that was guessed to be next may be on its way into that room
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for packed in self._blocks:
            packed.point_at(packed.views(packed.host))
        self._slots, self._arrivals = [], [None, None]
        self._move_the_rest(torch.device("cpu"))

    def _move_the_rest(self, device: torch.device) -> None:
        come_and_go = {id(tensor) for packed in self._blocks for tensor in packed.tensors}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            if id(tensor) not in come_and_go:
                tensor.data = tensor.data.to(device)

    def _before(self, index: int):
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if index not in self._resident:
                self._bring(index, slot=0)
            slot = self._resident.index(index)
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_event(self._arrivals[slot])
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
        self._resident[slot] = None  # what was there is gone from here on, even if the copying is interrupted
        if self._stream is None:
            target.copy_(packed.host)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                target.copy_(packed.host, non_blocking=True)
                self._arrivals[slot] = self._stream.record_event()
        packed.point_at(views[index])
        self._resident[slot] = index


def _host_rooms(sizes: Sequence[int], *, pin: bool) -> Iterator[Tensor]:
    """Yields host buffers of these sizes, each allocated when it is asked for.

    They are cut from larger pieces: PyTorch rounds what it page-locks up to a power of two, and alone a block of
    150 MB would take 256.
    """
    piece, used = torch.empty(0, dtype=torch.uint8), 0
    for number, size in enumerate(sizes):
        if used + size > piece.numel():
            wanted = max(size, min(_PIECE, sum(sizes[number:])))
            piece, used = torch.empty(wanted, dtype=torch.uint8, pin_memory=pin), 0
        yield piece[used : used + size]
        used += size


class _Frozen:
    """One block's frozen tensors, and where each begins when they lie end to end."""

    def __init__(self, block: nn.Module):
        self.tensors = [*(p for p in block.parameters() if not p.requires_grad), *block.buffers()]
        padded = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in self.tensors]
        *self.offsets, self.size = accumulate(padded, initial=0)


class _Packed:
    """One block's frozen tensors, end to end in one host buffer."""

    def __init__(self, frozen: _Frozen, host: Tensor):
        self.tensors, self._offsets, self.host = frozen.tensors, frozen.offsets, host
        for tensor, view in zip(self.tensors, self.views(host), strict=True):
            view.copy_(tensor.detach())
            tensor.data = view  # at once, so that no more than this is there twice

    def point_at(self, places: list[Tensor]) -> None:
        """Lets the tensors have their data there."""
        for tensor, place in zip(self.tensors, places, strict=True):
            tensor.data = place

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns the tensors as parts of `buffer`."""
        return [
            buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, start in zip(self.tensors, self._offsets, strict=True)
        ]
