"""A small real data set of coloured patterns, and a small random DINOv3, on disk."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from vflora.head.config import HeadConfig
from vflora.models.random_weights import small_dinov3_vit

SIZE = (32, 48)


def _picture(identity: int, number: int) -> bytes:
    """Blocks of colour that are the identity's own, with noise and a shift that are the picture's own."""
    blocks = np.random.default_rng(identity).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    drawn = np.asarray(Image.fromarray(blocks).resize((SIZE[1], SIZE[0]), Image.Resampling.NEAREST), np.int16)
    random = np.random.default_rng([identity, number])
    drawn = np.roll(drawn, random.integers(-3, 4), axis=1) + random.integers(-20, 21, drawn.shape)
    stream = io.BytesIO()
    Image.fromarray(drawn.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _write_split(root: Path, split: str, counts: list[int], first: int = 0) -> None:
    """Writes counts[i] pictures of identity i, pictures `first` and up, in one shard, with the manifest."""
    folder = root / "data" / split
    folder.mkdir(parents=True)
    # Through an open file: the package switches webdataset's own opening of paths off for the whole process.
    with open(folder / f"{split}-000000.tar", "wb") as shard, wds.TarWriter(shard) as writer:
        for identity, count in enumerate(counts):
            for number in range(first, first + count):
                key = f"{identity:03d}_{number:03d}"
                writer.write({"__key__": key, "png": _picture(identity, number), "json": {"identity_id": identity}})
    (root / "manifest").mkdir(exist_ok=True)
    with open(root / "manifest" / f"{split}_manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([["identity_id", "count"], *enumerate(counts)])


@pytest.fixture
def write_split():
    return _write_split


@pytest.fixture
def wds_root(tmp_path):
    _write_split(tmp_path / "wds", "train", [6] * 6)
    _write_split(tmp_path / "wds", "val", [4] * 6, first=100)
    return tmp_path / "wds"


@pytest.fixture
def model_dir(tmp_path):
    small_dinov3_vit().save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.fixture
def options(tmp_path, wds_root, model_dir):
    """Settings of a run of ten quick steps."""
    return {
        "model_dir": model_dir,
        "wds_root": wds_root,
        "output_dir": tmp_path / "out",
        "id_key": "identity_id",
        "pk_identities": 4,
        "pk_instances": 2,
        "total_steps": 10,
        "proj_dims": [16, 8],
        "val_every": 5,
        "save_every": 4,
        "log_every": 1,
        "model_dtype": "fp32",
        "num_workers": 0,
        "logger": "none",
    }


@pytest.fixture
def config(options):
    return HeadConfig(**options)
