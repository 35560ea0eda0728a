"""Speaking once: of several processes with the same thing to say, one says it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from datetime import timedelta

from vflora.distributed.launch import process_count

_PATIENCE = timedelta(seconds=5)
_said: Counter[str] = Counter()


def first_to_say(message: str) -> bool:
    """Returns whether this process should say `message`: true for one of those that come with the same words.

    Whoever is first says it, whichever its number, so that nothing is lost that happens to one process alone. They
    find out through torchrun's store. Said twice by one process it is said twice.
    """
    if process_count() == 1:
        return True
    # Here and not above: torch takes seconds to import, which --help has no need of.
    import torch.distributed as dist

    from vflora.distributed.watchdog import attempt

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        # No store yet, and nothing yet that could differ between the processes of a machine.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    _said[message] += 1
    words = hashlib.sha256(message.encode()).hexdigest()
    try:
        # A connection of its own: this may be said while a collective holds the other one.
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE
        )
        return store.add(f"vflora/{attempt()}/said/{words}/{_said[message]}", 1) == 1
    except dist.DistError:
        return True  # whoever holds the store is gone: better twice than never


def said_once(record: logging.LogRecord) -> bool:
    """A filter for logging that lets a warning through in the process that is first with it."""
    return record.levelno < logging.WARNING or first_to_say(record.getMessage())
