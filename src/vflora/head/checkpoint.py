"""Checkpoints of the head's training: checked when read, and enough to go on exactly.

checkpoint-<step>/
    identity_head.safetensors   the head, ready to use
    optimizer.pt                AdamW and the learning rate schedule
    state.json                  step, best scores so far, and the settings that decide the numbers
    manifest.json               sha256 of every file above
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vflora.atomic import require_space, write_folder
from vflora.checkpoint import find_checkpoint, list_checkpoints, verify_checkpoint
from vflora.errors import UserError
from vflora.models.projection_head import HEAD_FILE, ProjectionHead, load_head, save_head

LAST_HEAD_FILE = "identity_head_last.safetensors"
_SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class HeadState:
    """Everything a run needs to go on as if it had never stopped.

    Every random number is keyed by the seed and the step, and the data by the step, so there is nothing else.

    Attributes:
        step: optimizer steps done.
        head: the head.
        optimizer: state dict of AdamW.
        schedule: state dict of the learning rate schedule.
        best: what the best validation so far was ranked by; empty before the first one.
        settings: recipe, data set and processes, as plain values.
    """

    step: int
    head: ProjectionHead
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    best: tuple[float, ...]
    settings: dict[str, Any]


def save_state(state: HeadState, output_dir: Path, keep: int | None) -> Path:
    """Writes `output_dir/checkpoint-<step>`; a kill at any moment leaves earlier checkpoints whole.

    Args:
        state: what to write.
        output_dir: the run's folder.
        keep: newest checkpoints to keep; None keeps all.

    Raises:
        UserError: if the disk has no room, before anything is written.
    """
    weights = 4 * sum(p.numel() for p in state.head.parameters())
    advice = "make room and resume from the last checkpoint, which is whole; --keep_checkpoints N bounds their number."
    require_space(output_dir, 4 * weights + _SPARE_BYTES, advice)

    def fill(folder: Path) -> None:
        save_head(state.head, folder / HEAD_FILE)
        torch.save({"optimizer": state.optimizer, "schedule": state.schedule}, folder / "optimizer.pt")
        facts = {"step": state.step, "best": state.best, "settings": state.settings}
        (folder / "state.json").write_text(json.dumps(facts, indent=2))

    folder = write_folder(output_dir / f"checkpoint-{state.step}", fill)
    for old in list_checkpoints(output_dir)[: -keep if keep else 0]:
        shutil.rmtree(old)
    return folder


def load_state(folder: Path) -> HeadState:
    """Reads a checkpoint.

    Raises:
        UserError: if it is missing or damaged.
    """
    verify_checkpoint(folder)
    if not (folder / HEAD_FILE).is_file():
        raise UserError(f"{folder} is no checkpoint of `vflora train-head`: pass one of its checkpoint-<step> folders.")
    facts = json.loads((folder / "state.json").read_text())
    tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    return HeadState(
        step=facts["step"],
        head=load_head(folder / HEAD_FILE),
        optimizer=tensors["optimizer"],
        schedule=tensors["schedule"],
        best=tuple(facts["best"]),
        settings=facts["settings"],
    )


def starting_point(wanted: str | None, output_dir: Path, settings: dict[str, Any]) -> HeadState | None:
    """Returns the state that --resume_from_checkpoint means; None for a new run.

    Raises:
        UserError: if the checkpoint is missing, damaged or another run's.
    """
    folder = None if wanted is None else find_checkpoint(wanted, output_dir)
    if folder is None:
        return None
    state = load_state(folder)
    saved, current = state.settings, json.loads(json.dumps(settings))
    differing = [
        f"{name} was {saved.get(name)} and is {current.get(name)}"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise UserError(
            f"{folder} belongs to another run: {'; '.join(differing)}. Resume with the saved settings, "
            "or start anew in another --output_dir."
        )
    return state
