"""Training of the world's identity head: hundreds of creatures from stills, so that near misses count as misses.

A head that has met eight creatures tells those eight apart and finds everything else alike: to it, drifted frames are
at a cosine of 0.96 to their pictures; to one that has met 384, at 0.81. The identity loss can mend only what its head
sees.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from vflora import train_head
from vflora.atomic import write_folder
from vflora.cli import parse
from vflora.data import pack
from vflora.errors import UserError
from vflora.models.projection_head import HEAD_FILE
from vflora.run_folder import finished
from vflora.world.stills import write_still_folder

HEAD_STEPS = 300
_CREATURES, _IDENTITIES, _PICTURES = 384, 48, 12


def train_world_head(
    folder: Path,
    *,
    size: int,
    steps: int = HEAD_STEPS,
    creatures: int = 0,
    identities: int = 0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Trains the head on stills of the creatures of the split "train" and keeps it in `folder`/head.

    Args:
        folder: of the world, with DINOv3 in dino/.
        size: side of the pictures in pixels.
        steps: of training.
        creatures: that it meets; 0 for all 384 of the split.
        identities: that a step compares; 0 for 48.
        seed: of everything random.
        device: as the flag has it.

    Raises:
        UserError: if there is no DINOv3 yet.
    """
    dino = folder / "dino"
    if not (dino / "config.json").is_file():
        raise UserError(f"There is no DINOv3 in {dino}: train it first with --stage dino.")
    with TemporaryDirectory() as place:
        pictures, data, run = (Path(place) / name for name in ("pictures", "data", "run"))
        creatures = creatures or _CREATURES
        write_still_folder(
            pictures,
            domain="creatures",
            split="train",
            per_character=_PICTURES,
            seed=seed,
            size=size,
            limit=creatures,
        )
        pack_stills(pictures, data, size=size)
        identities = min(identities or _IDENTITIES, creatures)
        fit_head(dino, data, run, steps=steps, identities=identities, seed=seed, device=device)
        write_folder(folder / "head", lambda head: shutil.copyfile(run / HEAD_FILE, head / HEAD_FILE) and None)


def fit_head(
    dino: Path, data: Path, output: Path, *, steps: int, identities: int, seed: int, device: str = "auto"
) -> None:
    """Trains a head on packed stills with `vflora train-head`, so many identities a step."""
    flags = ["--model_dir", str(dino), "--wds_root", str(data), "--output_dir", str(output), "--num_workers", "0"]
    flags += ["--id_key", "identity_id", "--pk_identities", str(identities), "--total_steps", str(steps)]
    flags += ["--val_every", str(steps), "--learning_rate", "1e-3", "--proj_dims", "128", "64"]
    flags += ["--model_dtype", "fp32", "--seed", str(seed), "--device", device]
    train_head.run(parse("train-head", flags))
    finished(output, steps)


def pack_stills(pictures: Path, output: Path, *, size: int = 64) -> None:
    """Packs a folder of stills into a data set, a fifth of each character's for validation."""
    flags = [str(pictures), "--output", str(output), "--metadata_key", "character", "--resolution", f"{size}x{size}"]
    pack.run(parse("data pack", [*flags, "--val_split", "0.2", "--image_format", "png"]))
