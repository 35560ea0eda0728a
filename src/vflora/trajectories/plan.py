"""Which rollouts there are to make, and who makes them. Pure.

A rollout is one micro-batch of one data-parallel process of the training. They are counted over the run:

    rollout = batch number x processes + process
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from vflora.settings import TrainSettings


@dataclass(frozen=True)
class Plan:
    """How the rollouts of a training run are counted.

    Attributes:
        processes: data-parallel processes of the training.
        accumulation: micro-batches of an optimizer step.
        reuse: optimizer steps that share a rollout.
    """

    processes: int
    accumulation: int
    reuse: int

    @classmethod
    def of(cls, settings: TrainSettings, processes: int) -> Self:
        """Returns how the rollouts of a training on so many data-parallel processes are counted."""
        return cls(processes, settings.optimizer.gradient_accumulation_steps, settings.rollout.trajectory_reuse)

    def rollouts(self, steps: int) -> int:
        """Returns how many rollouts the first `steps` optimizer steps look at."""
        return -(-steps // self.reuse) * self.accumulation * self.processes

    def batches(self, steps: int) -> int:
        """Returns how many batches of each process the first `steps` optimizer steps look at."""
        return self.rollouts(steps) // self.processes

    def steps(self, rollouts: int) -> int:
        """Returns how many optimizer steps the first `rollouts` rollouts are enough for."""
        return rollouts // (self.accumulation * self.processes) * self.reuse

    def place(self, rollout: int) -> tuple[int, int]:
        """Returns batch number and process of a rollout."""
        return divmod(rollout, self.processes)

    def block(self, number: int) -> int:
        """Returns which block of `reuse` steps the batch of this number serves."""
        return number // self.accumulation


def gaps(found: Iterable[range], wanted: range) -> list[range]:
    """Returns the parts of `wanted` that no range of `found` covers, in order."""
    missing, place = [], wanted.start
    for part in [*sorted(found, key=lambda part: part.start), range(wanted.stop, wanted.stop)]:
        end = min(part.start, wanted.stop)
        if place < end:
            missing.append(range(place, end))
        place = max(place, part.stop)
    return missing


def shares(missing: Iterable[range], *, per_shard: int, rank: int, size: int) -> list[range]:
    """Returns what one of `size` processes has to make, a shard each.

    Rollouts belong to a process by their number alone, `per_shard` in a row, so that processes which look at the
    folder at different times never make the same.
    """
    mine = []
    for part in missing:
        for first in range(part.start - part.start % per_shard, part.stop, per_shard):
            if first // per_shard % size == rank:
                mine.append(range(max(first, part.start), min(first + per_shard, part.stop)))
    return mine
