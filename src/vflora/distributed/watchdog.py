"""Notices a process that is gone, by name.

A killed process leaves the others waiting in a collective, on CUDA without an error for as long as its timeout. So
every process counts up a number in torchrun's key-value store every two seconds, in a thread, and reads the numbers
of the others. torchrun ends the processes of the same machine by itself; this tells who was first, and ends those on
other machines.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from vflora.errors import UserError

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 2.0
_PATIENCE_SECONDS = 30.0
_SUSPICION_SECONDS = 7.0


def attempt() -> str:
    """Returns what tells this start of the processes from the one before a restart.

    On one machine torchrun's store outlives a restart, and with it the addresses of the dead. On several, the agents
    count restarts differently, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every start a store of its own.
    """
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "several machines"


class LostProcessError(UserError):
    """Another process is gone, and this one cannot go on without it."""

    def __init__(self, names: list[str]):
        """Takes the names of the processes that are gone."""
        super().__init__(
            f"{' and '.join(names)} is gone, and nothing can go on without it: start again with "
            "--resume_from_checkpoint auto (torchrun --max_restarts does so by itself)."
        )


class Watchdog:
    """Counts up for this process and looks at the others."""

    def __init__(
        self,
        rank: int,
        size: int,
        *,
        beat_seconds: float = _BEAT_SECONDS,
        patience_seconds: float = _PATIENCE_SECONDS,
    ):
        """Connects to the store of the rendezvous; call it on all processes.

        Args:
            rank: this process.
            size: number of processes.
            beat_seconds: time between two beats.
            patience_seconds: how long a process may keep silent before it counts as gone.
        """
        self._rank, self._size = rank, size
        self._beat_seconds, self._patience_seconds = beat_seconds, patience_seconds
        self._prefix = f"vflora/{attempt()}/watchdog"
        # A connection of its own: the thread must not wait behind the collectives of the main one.
        self._store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=patience_seconds),
        )
        self._store.set(self._key("beat", rank), "0")
        self._store.set(self._key("name", rank), f"process {rank} (pid {os.getpid()} on {platform.node()})")
        self._others = [other for other in range(size) if other != rank]
        self._names = {
            other: name.decode()
            for other, name in zip(
                self._others, self._store.multi_get([self._key("name", o) for o in self._others]), strict=True
            )
        }
        self._last: dict[int, bytes] = {}
        self._seen = dict.fromkeys(self._others, time.monotonic())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begins to beat and to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def gone(self) -> list[str]:
        """Waits long enough to be sure and returns the names of processes that have fallen silent.

        For use after a collective has failed, which says that a connection is closed, but not whose.
        """
        deadline = time.monotonic() + _SUSPICION_SECONDS + self._beat_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 4)
            silent = self._silent(_SUSPICION_SECONDS)
            if silent:
                return silent
        return []

    def _run(self) -> None:
        count = 0
        while not self._stop.wait(self._beat_seconds):
            count += 1
            try:
                self._store.set(self._key("beat", self._rank), str(count))
                beats = self._store.multi_get([self._key("beat", other) for other in self._others])
            except dist.DistError:
                self._end("torchrun's store does not answer: the machine or the launcher that holds it is gone.")
                return
            now = time.monotonic()
            for other, beat in zip(self._others, beats, strict=True):
                if self._last.get(other) != beat:
                    self._last[other], self._seen[other] = beat, now
            silent = self._silent(self._patience_seconds)
            if silent:
                self._end(str(LostProcessError(silent)))
                return

    def _silent(self, seconds: float) -> list[str]:
        now = time.monotonic()
        return [self._names[other] for other, seen in self._seen.items() if now - seen > seconds]

    def _end(self, what: str) -> None:
        if self._stop.is_set():
            return
        logger.error("vflora: %s (said process %d)", what, self._rank)
        logging.shutdown()
        # The main thread may be waiting in a collective that will never end, and cannot be interrupted there.
        os._exit(1)

    def _key(self, kind: str, rank: int) -> str:
        return f"{self._prefix}/{kind}/{rank}"
