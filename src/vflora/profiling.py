"""`--profile_steps 5-7`: a trace of those steps, for a browser's timeline (ui.perfetto.dev or chrome://tracing)."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, record_function, supported_activities

from vflora.atomic import replace_file
from vflora.errors import UserError

logger = logging.getLogger(__name__)


def parse_steps(text: str) -> range:
    """Reads "5-7" or "5" as steps, counted from 1.

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", text.strip())
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not steps:
        raise UserError(f"--profile_steps {text!r} is no range of steps: write it like 5-7, or 5.")
    return steps


class StepTracer:
    """Records some steps of a run with PyTorch's profiler and writes their trace, which is there whole or not at all.

    Recording slows a step down a little: leave recorded steps out of timings.
    """

    def __init__(self, steps: str | None, folder: Path, *, run: range):
        """Takes what to record.

        Args:
            steps: as `parse_steps` reads them; None records nothing.
            folder: gets steps-FIRST-LAST.json.gz.
            run: the steps that are going to be taken, counted from 1.

        Raises:
            UserError: for steps that this run does not take.
        """
        wanted = parse_steps(steps) if steps is not None else range(0)
        self._steps = range(max(wanted.start, run.start), min(wanted.stop, run.stop))
        if steps is not None and not self._steps:
            raise UserError(
                f"--profile_steps {steps}: this run takes steps {run.start} to {run.stop - 1}, choose among those."
            )
        self._folder = folder
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Runs step `number` inside, recorded if it is one of those; after the last one the trace is written."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=supported_activities(), record_shapes=True)
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Writes what has been recorded, if anything: also where a run was stopped before the last of the steps."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / f"steps-{self._steps[0]}-{self._steps[-1]}.json.gz"
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            exported = Path(scratch) / target.name  # the profiler compresses what is named .gz
            recorded.export_chrome_trace(str(exported))
            replace_file(target, lambda path: shutil.move(exported, path))
        logger.info("wrote %s: open it in https://ui.perfetto.dev", target)
