"""Bytes that nobody vouches for -> RGB pictures of one size."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_MEGAPIXELS = 40.0

_TRANSPOSING_ORIENTATIONS = (5, 6, 7, 8)

# Pillow only warns about a picture of 89 megapixels; nothing in this project wants one.
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Damaged EXIF data do not make a picture unreadable.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")


class BadImageError(Exception):
    """A picture that cannot or must not be decoded; the message says why in a few words."""


@contextmanager
def _named_faults() -> Iterator[None]:
    """Turns what Pillow raises on damaged data into `BadImageError`."""
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImageError("far too many pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not a JPEG, PNG or WebP picture") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise BadImageError(f"damaged: {error}") from error
    except (struct.error, zlib.error, OverflowError, MemoryError) as error:
        raise BadImageError(f"damaged: {error}") from error


def _open(data: bytes, max_megapixels: float) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > max_megapixels * 1e6:
        raise BadImageError(
            f"{width}x{height} pixels are {width * height / 1e6:.1f} megapixels, the limit is {max_megapixels:g}"
        )
    return image


def upright_size(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> tuple[int, int]:
    """Reads (height, width) from the header alone, after the rotation that EXIF asks for.

    Raises:
        BadImageError: not a JPEG, PNG or WebP, damaged, or more pixels than allowed.
    """
    with _named_faults(), _open(data, max_megapixels) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in _TRANSPOSING_ORIENTATIONS:
            width, height = height, width
        return height, width


def decode(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Decodes the first frame of a picture to upright RGB, transparent parts over white.

    The pixel count is checked in the header, before anything is unpacked.

    Raises:
        BadImageError: not a JPEG, PNG or WebP, damaged, or more pixels than allowed.
    """
    with _named_faults(), _open(data, max_megapixels) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: palettes expanded, transparency over white, 16 bits scaled to 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey instead of scaling it, which would turn most of the picture white.
        grey = np.asarray(image).astype(np.float32)
        image = Image.fromarray((grey / 257.0).round().clip(0, 255).astype(np.uint8), "L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], how: Literal["crop", "pad"]) -> Image.Image:
    """Brings a picture to `size` = (height, width) without stretching it.

    Args:
        image: RGB picture.
        size: height and width in pixels.
        how: "crop" cuts the overhang off, evenly on both sides; "pad" keeps everything on a white sheet.
    """
    height, width = size
    if how == "crop":
        return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return ImageOps.pad(image, (width, height), method=Image.Resampling.LANCZOS, color=(255, 255, 255))


def to_tensor(image: Image.Image) -> Tensor:
    """Returns an RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def to_signed(images: Tensor) -> Tensor:
    """Maps uint8 [..., 3, H, W] to fp32 in [-1, 1], what the VAE and the identity embedder take."""
    return images.to(torch.float32) / 127.5 - 1.0
