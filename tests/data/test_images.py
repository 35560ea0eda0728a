import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vflora.data.images import BadImageError, decode, fit, to_signed, to_tensor, upright_size


def huge_png(width: int, height: int) -> bytes:
    """A PNG header that promises width x height pixels, and next to no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_reads_each_allowed_format(kit, form):
    data = kit.encoded(kit.picture(1), form)
    assert upright_size(data) == (32, 48)
    image = decode(data)
    assert image.mode == "RGB"
    assert image.size == (48, 32)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_refuses_other_formats(kit, form):
    with pytest.raises(BadImageError, match="not a JPEG, PNG or WebP"):
        decode(kit.encoded(kit.picture(1), form))


def test_exif_rotation_is_applied_and_known_from_the_header(kit):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise
    upright = kit.picture(3)
    data = kit.encoded(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert upright_size(data) == (32, 48)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


def test_transparency_lies_over_white(kit):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    pixels = np.asarray(decode(kit.encoded(image)))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[1, 3].tolist() == [255, 255, 255]


def test_palette_with_a_transparent_colour_lies_over_white(kit):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    pixels = np.asarray(decode(kit.encoded(image, transparency=0)))
    assert pixels[0].tolist() == [[255, 255, 255], [10, 20, 30]]


def test_sixteen_bit_grey_is_scaled_not_clipped(kit):
    grey = np.array([[0, 32896, 65535]], dtype=np.uint16)
    pixels = np.asarray(decode(kit.encoded(Image.fromarray(grey))))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["L", "1", "LA", "CMYK"])
def test_every_mode_becomes_rgb(kit, mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(kit.encoded(kit.picture(1).convert(mode), form)).mode == "RGB"


@pytest.mark.parametrize("side", [6400, 10_000, 60_000])
def test_too_many_pixels_are_refused_from_the_header(side):
    data = huge_png(side, side)
    for read in (decode, upright_size):
        with pytest.raises(BadImageError, match="pixels"):
            read(data)


def test_the_pixel_limit_can_be_set(kit):
    assert decode(kit.encoded(kit.picture(1)), max_megapixels=0.002).size == (48, 32)
    with pytest.raises(BadImageError, match="0.001"):
        decode(kit.encoded(kit.picture(1)), max_megapixels=0.001)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture_is_named_as_damaged(kit, form):
    data = kit.encoded(kit.picture(1, (64, 64)), form)
    with pytest.raises(BadImageError):
        decode(data[: len(data) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_no_damage_gets_past_as_another_exception(kit, form):
    rng = np.random.default_rng(0)
    clean = np.frombuffer(kit.encoded(kit.picture(2, (64, 64)), form, exif=Image.Exif()), np.uint8)
    refused = 0
    for _ in range(300):
        broken = clean.copy()
        where = rng.integers(0, len(broken), rng.integers(1, 8))
        broken[where] = rng.integers(0, 256, len(where))
        try:
            assert decode(broken.tobytes()).mode == "RGB"
        except BadImageError:
            refused += 1
    assert refused > 0


def test_cropping_keeps_the_middle_without_stretching():
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    image.paste((0, 0, 255), (25, 0, 75, 50))
    cropped = fit(image, (32, 32), "crop")
    assert cropped.size == (32, 32)
    assert cropped.crop((4, 0, 28, 32)).getcolors() == [(24 * 32, (0, 0, 255))]


def test_padding_keeps_everything_on_white():
    padded = np.asarray(fit(Image.new("RGB", (64, 32), (0, 0, 0)), (64, 64), "pad"))
    assert (padded[:16] == 255).all()
    assert (padded[16:48] == 0).all()
    assert (padded[48:] == 255).all()


def test_tensors_are_channels_first_and_own_their_memory(kit):
    image = kit.picture(7)
    tensor = to_tensor(image)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 32, 48)
    assert tensor[:, 5, 9].tolist() == list(image.getpixel((9, 5)))
    tensor.zero_()
    assert image.getpixel((9, 5)) == kit.picture(7).getpixel((9, 5))


def test_signed_values_span_minus_one_to_one():
    assert to_signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_only_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert decode(stream.getvalue()).getpixel((0, 0)) == (255, 0, 0)
