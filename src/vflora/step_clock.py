"""Where a step's time goes, measured on the accelerator without making it wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function

PARTS = ("data", "rollout", "distillation", "identity", "decode", "optimizer")
"""What every step is split into, in this order; a part that did not happen took no time."""


class StepClock:
    """Adds up the seconds of named parts.

    A part inside another one counts for itself and not for the outer one, so that the parts add up to the step. On
    CUDA the marks are events, read when `seconds` is called; elsewhere they are wall-clock times.
    """

    def __init__(self, device: torch.device):
        """Takes the device that does the work."""
        self._cuda = device.type == "cuda"
        self._open: list[tuple[str, Any]] = []
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside towards `name`."""
        start = self._mark()
        if self._open:
            self._spans.append((*self._open[-1], start))
        self._open.append((name, start))
        try:
            with record_function(name):  # a name in the profiler's trace
                yield
        finally:
            end = self._mark()
            self._spans.append((*self._open.pop(), end))
            if self._open:
                self._open[-1] = (self._open[-1][0], end)

    def seconds(self) -> dict[str, float]:
        """Returns the sums so far, waiting for the accelerator to get there; those of `PARTS` are always there."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._spans:
            sums[name] = sums.get(name, 0.0) + (start.elapsed_time(end) / 1000 if self._cuda else end - start)
        return sums

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def split(seconds: dict[str, float]) -> str:
    """Returns the parts that take more than a hundredth of the time, the longest first: "rollout 2.31, decode 0.40"."""
    whole = sum(seconds.values())
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.2f}" for name, value in longest if value > whole / 100)
