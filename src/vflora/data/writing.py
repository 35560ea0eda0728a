"""Encoded pictures, shards and manifests on disk."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from PIL import Image
from tqdm import tqdm
from webdataset.writer import ShardWriter

from vflora.data.schema import COUNT_KEY, IDENTITY_KEY, shard_folder


def encode(image: Image.Image, suffix: str, quality: int) -> bytes:
    """Encodes a picture as jpg (without colour subsampling, for drawn edges), webp or png."""
    if suffix == "jpg":
        return _jpeg(image, quality)
    stream = io.BytesIO()
    if suffix == "webp":
        image.save(stream, "WEBP", quality=quality, method=4)
    else:
        image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _jpeg(image: Image.Image, quality: int, *, optimize: bool = True) -> bytes:
    stream = io.BytesIO()
    try:
        image.save(stream, "JPEG", quality=quality, subsampling=0, optimize=optimize)
    except OSError:
        if not optimize:
            raise
        # Pillow guesses how large an optimized file can get, and gives up where fine detail makes it larger.
        return _jpeg(image, quality, optimize=False)
    return stream.getvalue()


def write_shards(
    root: Path,
    split: str,
    samples: Sequence[tuple[str, dict[str, object]]],
    pictures: Path,
    suffix: str,
    per_shard: int,
) -> None:
    """Writes the shards of a split; the same samples give the same bytes.

    Args:
        root: the data set's folder.
        split: train or val.
        samples: key and JSON fields of each sample, in the order they are to have.
        pictures: folder with an encoded picture per key.
        suffix: jpg, png or webp.
        per_shard: samples in one tar file.
    """
    folder = shard_folder(root, split)
    folder.mkdir(parents=True)
    if not samples:
        return
    opened: list[IO[bytes]] = []

    def open_shard(name: str) -> IO[bytes]:
        opened.append(open(folder / name, "wb"))  # noqa: SIM115
        return opened[-1]

    writer = ShardWriter(
        f"{split}-%06d.tar",
        maxcount=per_shard,
        opener=open_shard,
        post=lambda _: opened[-1].close(),
        verbose=0,
        mtime=0,  # a clock would make the bytes differ every time
    )
    try:
        for key, metadata in tqdm(samples, desc=f"writing {split}", unit="picture", delay=2.0):
            writer.write({"__key__": key, suffix: (pictures / key).read_bytes(), "json": metadata})
        writer.close()
    finally:
        for file in opened:
            with suppress(OSError):
                file.close()


def write_manifest(path: Path, metadata_key: str, counts: Mapping[str, int], numbers: Mapping[str, int]) -> None:
    """Writes a manifest: a row per character with its identity number and its pictures in the split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([metadata_key, IDENTITY_KEY, COUNT_KEY])
        writer.writerows([name, numbers[name], count] for name, count in counts.items())
