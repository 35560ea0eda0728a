"""One run at a time in a folder: locks that the system takes back when their holder ends, however it ends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from vflora.errors import UserError

logger = logging.getLogger(__name__)

_LOCKS = ".lock-*-of-*"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)
"""What file systems say that have none, such as NFS without its lock service."""


@contextmanager
def held(folder: Path, flag: str, *, rank: int = 0, size: int = 1) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be.

    A run that fails before it wrote anything leaves nothing behind, the folder included.

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
    own, new = folder / f".lock-{rank}-of-{size}", _new(folder)
    first = not own.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _taken(own, flag):
        try:
            for lock in _locks(folder):
                if not lock.name.endswith(f"-of-{size}"):
                    with _taken(lock, flag):
                        pass
            yield
        except BaseException:
            if first:
                own.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone, and makes anew
            with suppress(OSError):  # the first that is not empty, and all above it, stay
                for made in new:
                    made.rmdir()
            raise


def _locks(folder: Path) -> list[Path]:
    return sorted(folder.glob(_LOCKS))


def _new(folder: Path) -> list[Path]:
    """Returns which of a folder and those above it are not there yet, or were begun by another process just now."""
    if folder.exists():
        inside = list(folder.iterdir())
        return [folder] if inside and all(path.match(_LOCKS) for path in inside) else []
    return [folder, *(above for above in folder.parents if not above.exists())]


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
