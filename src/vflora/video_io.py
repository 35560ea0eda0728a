"""Videos to and from H.264 mp4 files, and contact sheets of their frames."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vflora.errors import UserError

DEFAULT_CRF = 16
"""Constant quality of libx264: 0 is lossless, 51 is worst; 16 is hard to tell from the source."""


def to_uint8_frames(video: Tensor | np.ndarray) -> np.ndarray:
    """Returns frames as uint8 [F, H, W, 3].

    Args:
        video: either a uint8 array or tensor [F, H, W, 3], returned as it is, or a floating tensor
            [3, F, H, W] in [-1, 1], as a VAE decodes it; values outside are clamped.

    Raises:
        ValueError: for any other shape or type.
    """
    if isinstance(video, Tensor) and video.is_floating_point():
        if video.ndim != 4 or video.shape[0] != 3:
            raise ValueError(f"a floating video must be [3, F, H, W], not {list(video.shape)}")
        scaled = (video.detach().float().clamp(-1, 1) + 1) * 127.5
        return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().contiguous().numpy()
    frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    return np.ascontiguousarray(frames)


def enlarge(frames: np.ndarray, side: int = 320) -> np.ndarray:
    """Repeats the pixels of small frames as often as they fit into `side`; larger frames stay as they are.

    H.264 for browsers keeps colour at half the resolution, which would smear frames of a few dozen pixels.

    Args:
        frames: uint8 [F, H, W, 3].
        side: longest side of the result at most, in pixels.
    """
    factor = max(1, side // max(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2) if factor > 1 else frames


def write_mp4(
    path: str | Path,
    video: Tensor | np.ndarray,
    fps: float = 24,
    *,
    crf: int = DEFAULT_CRF,
    max_side: int | None = None,
) -> Path:
    """Writes H.264 that every browser plays: yuv420p, index at the front, even sides.

    Odd heights and widths get one more row or column, a copy of the last. The file appears under its name
    only when it is whole.

    Args:
        path: file to write; its folder is made.
        video: anything that `to_uint8_frames` takes.
        fps: frames per second.
        crf: constant quality, lower is better.
        max_side: longest side in pixels; larger videos are scaled down to it.

    Returns:
        The path.
    """
    path = Path(path)
    frames = _fit_for_h264(to_uint8_frames(video), max_side)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".mp4")
    os.close(handle)
    try:
        _encode(temporary, frames, fps, crf)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """Reads every frame of the first video stream.

    Returns:
        frames, uint8 [F, H, W, 3], and frames per second.

    Raises:
        UserError: if the file holds no video that can be decoded.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream: give an mp4 file.")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps = float(stream.average_rate or 0)
    except (FFmpegError, OSError) as problem:
        raise UserError(f"{path} cannot be read as a video ({problem}): give a whole mp4 file.") from problem
    if not frames:
        raise UserError(f"{path} holds no frames: write it again.")
    return np.stack(frames), fps


def frame_grid(
    videos: Sequence[Tensor | np.ndarray], labels: Sequence[str], *, columns: int = 6, cell_height: int = 160
) -> Image.Image:
    """Draws a contact sheet: a row for each video, frames spread evenly from the first to the last.

    Args:
        videos: anything that `to_uint8_frames` takes; sizes and lengths may differ.
        labels: text to the left of each row.
        columns: frames a row at most.
        cell_height: height of a frame in the sheet, in pixels.

    Returns:
        An RGB picture.
    """
    if not videos or len(videos) != len(labels):
        raise ValueError(f"{len(videos)} videos and {len(labels)} labels: give one label for each video")
    font = ImageFont.load_default(size=14)
    rows = [_spread(to_uint8_frames(video), columns, cell_height) for video in videos]
    gap, margin = 6, 12
    label_width = max(int(font.getlength(label)) for label in labels) + 2 * margin
    width = label_width + max(sum(cell.width + gap for cell in row) for row in rows) + margin - gap
    height = 2 * margin + len(rows) * (cell_height + gap) - gap
    sheet = Image.new("RGB", (width, height), (250, 249, 247))
    draw = ImageDraw.Draw(sheet)
    y = margin
    for label, row in zip(labels, rows, strict=True):
        draw.text((margin, y + cell_height // 2 - 9), label, fill=(40, 40, 46), font=font)
        x = label_width
        for cell in row:
            sheet.paste(cell, (x, y))
            x += cell.width + gap
        y += cell_height + gap
    return sheet


def _spread(frames: np.ndarray, columns: int, cell_height: int) -> list[Image.Image]:
    indices = np.unique(np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int))
    width = max(1, round(cell_height * frames.shape[2] / frames.shape[1]))
    resample = Image.Resampling.LANCZOS if frames.shape[1] >= cell_height else Image.Resampling.NEAREST
    return [Image.fromarray(frames[i]).resize((width, cell_height), resample) for i in indices]


def _fit_for_h264(frames: np.ndarray, max_side: int | None) -> np.ndarray:
    height, width = frames.shape[1:3]
    if max_side is not None and max(height, width) > max_side:
        scale = max_side / max(height, width)
        size = (max(2, round(width * scale)), max(2, round(height * scale)))
        frames = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in frames])
        height, width = frames.shape[1:3]
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _encode(path: str, frames: np.ndarray, fps: float, crf: int) -> None:
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        # The same frames give the same bytes: one thread, and without x264's macroblock tree, whose result was
        # seen to change from call to call on equal input.
        options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        # players assume BT.709 limited range for H.264; untagged files shift colours between them
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 1, 1, 1, 1
        for array in frames:
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
