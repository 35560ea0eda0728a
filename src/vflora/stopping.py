"""Ctrl-C and SIGTERM as a wish to stop, not as an accident."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a flag, so that the step can be finished and saved.

    A second Ctrl-C interrupts at once, as usual. Works in the main thread only, as signals do.

    Yields:
        a function that tells whether a stop was asked for.
    """
    requested: list[int] = []

    def request(number: int, _frame: object) -> None:
        requested.append(number)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(requested)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
