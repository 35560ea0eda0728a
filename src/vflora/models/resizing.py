"""Resizing whose gradient is the same every time.

PyTorch's own backward passes of antialiased and of area interpolation add with atomics on a GPU, in whatever order
the threads come, and have no other form. But each side is resized by a fixed linear map, and a product of matrices has
an order. Where products are allowed TF32, pixels are rounded to its 10 bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Filter = Literal["area", "bilinear", "bicubic"]


def resize(images: Tensor, size: tuple[int, int], mode: Filter) -> Tensor:
    """Resizes images [..., H, W] to [..., *size], differentiably; images of that size are returned as they are.

    Args:
        images: of a floating type.
        size: height and width.
        mode: as `torch.nn.functional.interpolate` understands it, bilinear and bicubic with antialiasing, and with
            corners as pixels have them (`align_corners=False`).
    """
    if tuple(images.shape[-2:]) == size:
        return images
    down, across = (
        _weights(*sides, mode, images.device, images.dtype) for sides in zip(images.shape[-2:], size, strict=True)
    )
    return down @ images @ across.mT


@lru_cache(maxsize=64)
def _weights(before: int, after: int, mode: Filter, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns what every pixel of a resized line takes from every pixel of the line [after, before]."""
    lines = torch.eye(before, dtype=torch.float64)[None, None]
    return interpolate(lines, size=(after, before), mode=mode, antialias=mode != "area")[0, 0].to(device, dtype)
