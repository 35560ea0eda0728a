"""Lines of the log and progress bars in one terminal."""

from __future__ import annotations

import logging

from tqdm import tqdm


class AboveBars(logging.StreamHandler):
    """Writes each record on a line of its own above the progress bars, and not behind them on theirs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Takes the bars of the stream away, writes the record, and brings them back."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
