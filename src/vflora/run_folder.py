"""The folder of a run, looked at before anything large is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vflora.checkpoint import list_checkpoints
from vflora.config import require
from vflora.errors import UserError
from vflora.folder_lock import held


@contextmanager
def reserved(output_dir: Path, resume_from_checkpoint: str | None) -> Iterator[None]:
    """Keeps the folder of a run, and refuses one that could not write, or would write over another, ended or at work.

    Args:
        output_dir: of `vflora train` or `vflora train-head`.
        resume_from_checkpoint: what the run goes on from; None for a new one.

    Raises:
        UserError: with the way out.
    """
    require_writable(output_dir, "--output_dir")
    with held(output_dir, "--output_dir"):
        # Not before it is held: another run may have ended just now.
        there = list_checkpoints(output_dir)
        if there and not resume_from_checkpoint:
            raise UserError(
                f"{output_dir} already holds a run ({there[-1].name}): go on with --resume_from_checkpoint latest, "
                "or choose another --output_dir."
            )
        named = None if resume_from_checkpoint in (None, "latest", "auto") else Path(resume_from_checkpoint)
        if there and named and named.resolve().parent != output_dir.resolve():
            raise UserError(
                f"{output_dir} already holds a run ({there[-1].name}), which {named} is not of: choose another "
                "--output_dir."
            )
        yield


def finished(output_dir: Path, steps: int) -> Path:
    """Returns the last checkpoint of a training, for a program that builds on it.

    A training that is asked to stop saves and returns; whoever asked meant the program around it too.

    Args:
        output_dir: of `vflora train` or `vflora train-head`.
        steps: how many were wanted.

    Raises:
        KeyboardInterrupt: if it stopped before.
    """
    there = list_checkpoints(output_dir)
    if not there or there[-1].name != f"checkpoint-{steps}":
        raise KeyboardInterrupt
    return there[-1]


def require_writable(folder: Path, flag: str) -> Path:
    """Refuses a folder that cannot be made or written to.

    Returns:
        The folder, or the nearest one above it that is there.

    Raises:
        UserError: naming what is in the way.
    """
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    require(nearest.is_dir(), f"{nearest} is a file and no folder: choose another {flag}.")
    require(os.access(nearest, os.W_OK | os.X_OK), f"{nearest} cannot be written to: choose another {flag}.")
    return nearest
