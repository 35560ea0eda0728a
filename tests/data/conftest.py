"""Small real data sets, written member by member so that anything can be wrong with them."""

import csv
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

KEY = "species"
SIZE = (32, 48)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A few random blocks of colour; different seeds look different."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size[1], size[0]), Image.Resampling.NEAREST)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_manifest(path: Path, counts: dict[str, int], key: str = KEY) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([key, "identity_id", "count"])
        for number, (character, count) in enumerate(counts.items()):
            writer.writerow([character, number, count])


def sample_members(key: str, character: str, identity: int, data: bytes, suffix: str = "png"):
    metadata = {KEY: character, "identity_id": identity}
    return [(f"{key}.{suffix}", data), (f"{key}.json", json.dumps(metadata).encode())]


def write_data_set(
    root: Path, counts: dict[str, int], *, split: str = "train", shards: int = 2, size: tuple[int, int] = SIZE
) -> Path:
    """Writes `counts[character]` pictures of each character, dealt out over the shards."""
    samples = [
        sample_members(f"{character}-{i}", character, identity, encoded(picture(1000 * identity + i, size)))
        for identity, (character, count) in enumerate(counts.items())
        for i in range(count)
    ]
    for shard in range(shards):
        members = [member for sample in samples[shard::shards] for member in sample]
        write_tar(root / "data" / split / f"{split}-{shard:06d}.tar", members)
    write_manifest(root / "manifest" / f"{split}_manifest.csv", counts)
    return root


@pytest.fixture
def wds_root(tmp_path: Path) -> Path:
    """Three characters, 2, 6 and 12 pictures, in two shards; a validation split beside it."""
    root = tmp_path / "wds"
    write_data_set(root, {"ada": 2, "bob": 6, "cleo": 12})
    return write_data_set(root, {"ada": 2, "bob": 3, "cleo": 5}, split="val", shards=1)


@pytest.fixture
def kit() -> ModuleType:
    """The functions above: test modules cannot import from each other in pytest's importlib mode."""
    return sys.modules[__name__]
