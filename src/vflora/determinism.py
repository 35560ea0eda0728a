"""Every sum in the same order every time: what makes a run on a GPU repeatable to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vflora.errors import UserError

_REFUSAL = " does not have a deterministic implementation"  # PyTorch's words


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Inside, kernels of a GPU that add up in an order of their own give way to others that do not.

    On the CPU there are none of the first kind. Source: https://docs.pytorch.org/docs/stable/notes/randomness.html

    Args:
        wanted: whether to change anything.
        device: where to compute.

    Raises:
        UserError: from inside, where PyTorch has no kernel that adds up in order.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every empty tensor would be written once more
    try:
        yield
    except RuntimeError as error:
        kernel, refused, _ = str(error).partition(_REFUSAL)
        if not refused:
            raise
        raise UserError(f"{kernel} cannot add up in a fixed order on this GPU: give --deterministic false.") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
