"""The clips that validation leaves in a run's folder, for everything that shows them.

- previews/pictures/NAME.png: the held-out picture, written once
- previews/step-001000/NAME.mp4: teacher left, student right
- previews/step-001000.json: who they are and how they scored; there once all clips of the step are
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vflora.atomic import replace_file
from vflora.video_io import frame_grid, read_mp4, write_mp4

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class PreviewSample:
    """One held-out picture of a validation.

    Attributes:
        name: of its files, without folder and suffix.
        character: whom it shows.
        prompt: that was given.
        numbers: metrics of this sample alone, by the names of their means in the log.
    """

    name: str
    character: str
    prompt: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Preview:
    """A sample as it was at one step.

    Attributes:
        step: optimizer steps done.
        sample: whom it shows; only the name is known of clips whose step was never finished.
        video: the mp4, teacher left, student right.
        picture: the reference picture, where it was kept.
    """

    step: int
    sample: PreviewSample
    video: Path
    picture: Path | None


def file_name(key: str) -> str:
    """Returns the key of a sample as a plain file name: keys come from shards that others may have made."""
    plain = re.sub(r"[^\w-]+", "-", key).strip("-")
    return plain if plain and plain == key else f"{plain or 'sample'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def step_folder(output_dir: Path, step: int) -> Path:
    """Returns the folder of the clips of one validation."""
    return output_dir / "previews" / f"step-{step:06d}"


def write_preview(folder: Path, name: str, picture: Tensor, teacher: Tensor, student: Tensor) -> None:
    """Writes the clip of one sample, and its picture unless that is there from an earlier step.

    Args:
        folder: see `step_folder`.
        name: see `file_name`.
        picture: reference, uint8 [3, H, W].
        teacher: video of the base model [3, F, H, W] in [-1, 1].
        student: of the same shape, with the LoRA.
    """
    kept = folder.parent / "pictures" / f"{name}.png"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy()))
        replace_file(kept, lambda path: image.save(path, "PNG"))
    write_mp4(folder / f"{name}.mp4", torch.cat([teacher, student], dim=-1))


def write_index(folder: Path, samples: Sequence[PreviewSample]) -> None:
    """Writes down who is on the clips of `folder`; the main process does it when all clips are there."""
    content = json.dumps([asdict(sample) for sample in samples], indent=1, ensure_ascii=False)
    replace_file(_index(folder), lambda path: path.write_text(content + "\n", encoding="utf-8"))


def find_previews(output_dir: Path, step: int | None = None) -> tuple[Preview, ...]:
    """Returns the clips of a run, by step and then by name; one that is being written is not among them.

    Args:
        output_dir: of the run.
        step: of this validation only.
    """
    found = []
    folders = (output_dir / "previews").glob("step-*") if step is None else [step_folder(output_dir, step)]
    for folder in sorted(folders):
        match = _STEP.fullmatch(folder.name)
        if not match or not folder.is_dir():
            continue
        known = {sample.name: sample for sample in _read_index(folder)}
        for video in sorted(path for path in folder.glob("*.mp4") if not path.name.startswith(".")):
            picture = folder.parent / "pictures" / f"{video.stem}.png"
            sample = known.get(video.stem, PreviewSample(video.stem, video.stem, ""))
            found.append(Preview(int(match.group(1)), sample, video, picture if picture.is_file() else None))
    return tuple(sorted(found, key=lambda preview: (preview.step, preview.sample.name)))


def contact_sheet(preview: Preview) -> Image.Image:
    """Draws frames of a clip, evenly spread: the teacher above, the student below."""
    frames, _ = read_mp4(preview.video)
    half = frames.shape[2] // 2
    return frame_grid([frames[:, :, :half], frames[:, :, half:]], ["teacher", "student"])


def student_frame(preview: Preview) -> Image.Image:
    """Returns the middle frame of the student's half of a clip."""
    frames, _ = read_mp4(preview.video)
    return Image.fromarray(np.ascontiguousarray(frames[len(frames) // 2, :, frames.shape[2] // 2 :]))


def _index(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _read_index(folder: Path) -> list[PreviewSample]:
    index = _index(folder)
    if not index.is_file():
        return []
    entries: list[dict[str, Any]] = json.loads(index.read_text(encoding="utf-8"))
    return [PreviewSample(**entry) for entry in entries]
