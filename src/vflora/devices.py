"""Which device a run computes on: the one reading of every `--device` flag."""

from __future__ import annotations

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


def _devices_here(kind: str) -> int:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type == kind else 0
