"""Which device a run computes on, the one reading of every `--device` flag, and how much of a machine is ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vflora.errors import UserError


def torch_device(name: str) -> torch.device:
    """Returns the device that a `--device` flag means.

    Args:
        name: auto for the accelerator if this machine has one that works, whichever kind it is, else the CPU; or a
            device as PyTorch writes it: cuda, cuda:1, cpu.

    Raises:
        UserError: if PyTorch knows no such device, or this machine lacks it.
    """
    if name == "auto":
        # Builds of PyTorch for an accelerator name it on machines without one too, unless asked to look.
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device of PyTorch: write auto, cpu, cuda or cuda:1.") from error
    if device.type not in ("cpu", "meta") and (device.index or 0) >= _devices_here(device.type):
        raise UserError(f"--device {name} is not on this machine, or PyTorch cannot use it: write auto or cpu.")
    return device


def limit_memory(device: torch.device, gib: float) -> None:
    """Leaves this process so much of a GPU's memory from now on, as a smaller card would.

    Args:
        device: a CUDA device; without a number, the present one.
        gib: what PyTorch may hold on it, in GiB.

    Raises:
        UserError: as `share_of_memory`.
    """
    share = share_of_memory(device, gib)
    torch.cuda.empty_cache()
    # By its number: "cuda" alone, which most --device flags come to, has none, and this function then refuses it.
    torch.cuda.set_per_process_memory_fraction(share, device.index)


def share_of_memory(device: torch.device, gib: float) -> float:
    """Returns how much of a CUDA device's memory `--card_gib` asks for, above 0 and at most 1.

    Raises:
        UserError: for another kind of device, or one that has less.
    """
    if device.type != "cuda":
        raise UserError(f"--card_gib {gib:g} limits a CUDA GPU's memory, and this computes on {device}: leave it out.")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < gib * 2**30 <= total:
        raise UserError(f"--card_gib {gib:g} must be above 0 and at most the {total / 2**30:.1f} GiB that are there.")
    return gib * 2**30 / total


def available_memory(device: torch.device) -> int:
    """Returns how many bytes of a GPU's memory this process has or can have."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
    return min(free + torch.cuda.memory_reserved(device), allowed)


def has_room(device: torch.device, size: int) -> bool:
    """Tells whether a GPU has so many bytes more for this process; where that cannot be asked, it is True."""
    if device.type != "cuda":
        return True
    idle_in_graphs = sum(segment["total_size"] - segment["allocated_size"] for segment in graph_segments(device))
    return available_memory(device) - torch.cuda.memory_allocated(device) - idle_in_graphs >= size


def graph_segments(device: torch.device) -> list[dict[str, Any]]:
    """Returns what CUDA graphs hold for what comes and goes inside them; it counts as free until they replay."""
    number = torch.cuda.current_device() if device.index is None else device.index
    segments = (segment for segment in torch.cuda.memory_snapshot() if segment["device"] == number)
    return [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch's own work on the CPU has one thread: many that share small tensors only wait for each other.

    On 32 cores with two such processes, to draw a character of the miniature world took 150 ms instead of 4.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _devices_here(kind: str) -> int:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type == kind else 0
