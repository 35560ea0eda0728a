"""What a launcher such as torchrun tells a process of itself, before the processes have met."""

from __future__ import annotations

import os


def process_number() -> int:
    """Returns this process's number among those that were started together; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Returns how many processes were started together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Returns whether this is the only process of a run, or the first of those that a launcher started."""
    return process_number() == 0
