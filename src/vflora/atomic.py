"""Files and folders that are there whole or not at all, whenever the power goes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vflora.errors import UserError

T = TypeVar("T")

MANIFEST = "manifest.json"


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Makes a folder appear with everything in it.

    Args:
        target: the folder; one of this name is replaced as a whole, since overwriting in place could leave half
            of the old and half of the new.
        fill: writes the content into the folder it is given; manifest.json, the sha256 of every file, is added.

    Returns:
        `target`.
    """
    unfinished = begin_folder(target)
    fill(unfinished)
    return finish_folder(target)


def begin_folder(target: Path) -> Path:
    """Returns an empty folder to fill, which `finish_folder` turns into `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    return unfinished


def finish_folder(target: Path) -> Path:
    """Adds the manifest, waits for the disk, and makes the folder that `begin_folder` returned appear as `target`."""
    unfinished = _unfinished(target)
    files = sorted(p for p in unfinished.rglob("*") if p.is_file())
    (unfinished / MANIFEST).write_text(json.dumps({str(p.relative_to(unfinished)): sha256(p) for p in files}))
    for path in [*unfinished.rglob("*"), unfinished]:
        _sync(path)
    if target.exists():
        target.rename(stale := target.with_name(f".{target.name}.stale"))
        shutil.rmtree(stale)
    unfinished.rename(target)
    _sync(target.parent)
    return target


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def replace_file(target: Path, write: Callable[[Path], None], *, writer: str = "") -> None:
    """Makes a new version of a file appear in one instant; `write` writes it to the path it is given.

    Several processes may write the same content at a time if each gives a name of its own as `writer`.
    """
    unfinished = target.with_name(f".{target.name}{writer}.tmp")
    write(unfinished)
    publish(unfinished, target)


def publish(unfinished: Path, target: Path) -> None:
    """Waits for the disk, and makes a finished file of the same folder appear under its name."""
    _sync(unfinished)
    unfinished.replace(target)
    _sync(target.parent)


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
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file and no folder: choose another {flag}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest} cannot be written to: choose another {flag}.")
    return nearest


def require_space(folder: Path, wanted_bytes: int, advice: str) -> None:
    """Refuses to start writing what does not fit.

    Raises:
        UserError: with the free and the needed space, and `advice`.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes:
        raise UserError(
            f"{folder} has {free / 2**20:.0f} MiB free and {wanted_bytes / 2**20:.0f} may be needed: {advice}"
        )


def write_or_refuse(write: Callable[[], T], what: str, folder: Path, *, go_on: str) -> T:
    """Calls `write`, and turns what the disk says against it into a sentence.

    Args:
        write: adds one more of something to a folder, whole or not at all.
        what: that is.
        folder: where it goes.
        go_on: how to take up the work again.

    Raises:
        UserError: if it could not be written.
    """
    try:
        return write()
    except OSError as error:
        raise UserError(
            f"no {what} could be written to {folder}: {error}; the {what}s before are whole: make room and {go_on}."
        ) from error


def sha256(path: Path) -> str:
    """Returns the digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
