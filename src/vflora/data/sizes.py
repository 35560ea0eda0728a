"""The one size that all pictures of a data set have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import median

from vflora.errors import UserError
from vflora.resolution import clip_size

BUCKETS = ("480p", "720p")
"""The model's resolutions, each a family of sizes of about the same area."""
_SIZE_MULTIPLE = 16
_MAX_SIDE = 4096


def parse_size(text: str) -> tuple[int, int]:
    """Reads HEIGHTxWIDTH.

    Raises:
        UserError: another form, not multiples of 16 (what the VAE and the transformer need), or out of range.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise UserError(f"--resolution {text!r} is no size: write HEIGHTxWIDTH, 480p or 720p.")
    height, width = int(match[1]), int(match[2])
    if (
        height % _SIZE_MULTIPLE
        or width % _SIZE_MULTIPLE
        or not 0 < min(height, width) <= max(height, width) <= _MAX_SIDE
    ):
        near = "x".join(
            str(min(_MAX_SIDE, max(_SIZE_MULTIPLE, round(side / _SIZE_MULTIPLE) * _SIZE_MULTIPLE)))
            for side in (height, width)
        )
        raise UserError(f"--resolution {text} is not made of multiples of {_SIZE_MULTIPLE}: use {near}.")
    return height, width


def bucket_size(resolution: str, sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Returns the size that training would choose for a picture of the median aspect ratio, and then keep.

    Args:
        resolution: one of `BUCKETS`.
        sizes: height and width of each picture.
    """
    aspect = median(height / width for height, width in sizes)
    size = clip_size(resolution, (round(aspect * 10_000), 10_000), _SIZE_MULTIPLE)
    # Rounding in the model's table sends a few of its own sizes on to their neighbour, which then stays.
    while (kept := clip_size(resolution, size, _SIZE_MULTIPLE)) != size:
        size = kept
    return size
