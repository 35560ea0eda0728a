"""The folder of a run, looked at before anything large is loaded."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vflora.atomic import require_writable
from vflora.checkpoint import list_checkpoints
from vflora.errors import UserError
from vflora.folder_lock import held

logger = logging.getLogger(__name__)

_OF_STEP = re.compile(r"(?:checkpoint|step)-(\d+)(?:\.json|\.png)?")


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


def leave_later(output_dir: Path, step: int) -> None:
    """Renames the checkpoints and validations after `step`, which a run that goes back to it leaves behind.

    Otherwise `latest` would mean them, they would count among those to keep, and the newest clips would be theirs.
    """
    validations = [*output_dir.glob("previews/step-*"), *output_dir.glob("validation/step-*")]
    later = [
        path
        for path in [*list_checkpoints(output_dir), *validations]
        if (name := _OF_STEP.fullmatch(path.name)) and int(name.group(1)) > step
    ]
    for number in itertools.count(1):
        places = [path.with_name(f"left-{number}-{path.name}") for path in later]
        if not any(place.exists() for place in places):
            break
    for path, place in zip(later, places, strict=True):
        path.rename(place)
    if later:
        logger.warning("the run goes back to step %d: what came after is now called left-%d-...", step, number)


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
