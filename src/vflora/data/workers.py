"""Starting the processes that decode pictures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

from vflora.random_streams import keyed_generator


@contextmanager
def _stops_for_the_trainer_only() -> Iterator[None]:
    """Processes started inside see neither Ctrl-C nor SIGTERM, which terminals, torchrun and Slurm send to all.

    The step that is going to be finished still needs its data.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_the_trainer_only(_worker: int) -> None:
    """Ends the worker at a SIGTERM of the process that started it: so that one ends what runs when it ends."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    starter = multiprocessing.parent_process()
    trainer = starter.pid if starter else os.getppid()  # with a forkserver in between these are two

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, name="stop", daemon=True).start()


def start_workers(
    dataset: Dataset[Any], num_workers: int, seed: int, order: Iterator[int] | None = None
) -> Iterator[Any]:
    """Starts `num_workers` processes (none for 0) and returns what they deliver, in order.

    Args:
        dataset: an iterable data set, or one that takes the numbers of `order`.
        num_workers: processes; each holds its own copy of the data set.
        seed: keeps torch from drawing one out of the global generator.
        order: item numbers for a data set with `__getitem__`.
    """
    with _stops_for_the_trainer_only(), warnings.catch_warnings():
        # More workers than cores is no mistake here: they mostly wait for the disk.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=order,  # pyright: ignore[reportArgumentType]
            num_workers=num_workers,
            generator=keyed_generator(seed, "loader"),
            worker_init_fn=_obey_the_trainer_only,
        )
        return iter(loader)
