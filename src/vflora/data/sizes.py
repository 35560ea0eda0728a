"""The one size that all pictures of a data set have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from statistics import median

from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

from vflora.errors import UserError

BUCKETS = {"480p": 640, "720p": 960}
"""Side of the square whose area each of the model's resolutions has."""
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
    """Returns the size that the model's own image processor would give a picture of the median aspect ratio."""
    aspect = median(height / width for height, width in sizes)
    processor = HunyuanVideo15ImageProcessor()
    height, width = processor.calculate_default_height_width(round(aspect * 10_000), 10_000, BUCKETS[resolution])
    return int(height), int(width)
