"""Where a step's time goes, measured on the accelerator without making it wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StepClock:
    """Adds up the seconds of named parts.

    On CUDA the marks are events, read when `seconds` is called; elsewhere they are wall-clock times.
    """

    def __init__(self, device: torch.device):
        """Takes the device that does the work."""
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside towards `name`."""
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Returns the sums so far, waiting for the accelerator to get there."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            sums[name] += start.elapsed_time(end) / 1000 if self._cuda else end - start
        return dict(sums)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
