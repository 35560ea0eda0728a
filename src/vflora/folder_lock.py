"""One run at a time in a folder: locks that the system takes back when their holder ends, however it ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from vflora.errors import UserError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)
"""What file systems say that have none, such as NFS without its lock service."""


@contextmanager
def held(folder: Path, flag: str, *, rank: int = 0, size: int = 1) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be.

    Processes of one launch share the work by their numbers, and so the folder: out stay a second process of the same
    number, and every launch of another size.

    Args:
        folder: on storage that everybody shares.
        flag: that names it.
        rank: of this process.
        size: of the launch.

    Raises:
        UserError: if another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _taken(folder / f".lock-{rank}-of-{size}", flag):
        for lock in _locks(folder):
            if not lock.name.endswith(f"-of-{size}"):
                with _taken(lock, flag):
                    pass
        yield


def require_free(folder: Path, flag: str) -> None:
    """Refuses a folder that a run is at work in, without keeping it.

    Raises:
        UserError: with the way out.
    """
    for lock in _locks(folder):
        with _taken(lock, flag):
            pass


def _locks(folder: Path) -> list[Path]:
    return sorted(folder.glob(".lock-*-of-*"))


@contextmanager
def _taken(path: Path, flag: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is at work in {path.parent}: wait until it ends, stop it, or choose another {flag}."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("%s cannot be locked (%s): see to it that no other run works there", path.parent, error)
    try:
        yield
    finally:
        lock.release()
