"""Chosen samples -> pixels; damaged ones are noted instead of ending the run."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from PIL import Image

from vflora.data.images import BadImageError, decode
from vflora.data.schema import require_size
from vflora.data.shards import Sample
from vflora.errors import UserError

logger = logging.getLogger(__name__)

_NAMED = 10

Faults = dict[str, str]
"""Name of each damaged sample -> what is wrong with it."""


def decode_sample(sample: Sample, size: tuple[int, int], faults: Faults) -> Image.Image | None:
    """Decodes one picture; a damaged or oversized one is noted in `faults` and gives None.

    Raises:
        UserError: the picture is sound but has another size than the data set.
    """
    try:
        image = decode(sample.read())
    except BadImageError as error:
        faults[sample.name] = str(error)
        return None
    require_size(sample, (image.height, image.width), size)
    return image


def first_readable(
    samples: Iterable[Sample], size: tuple[int, int], faults: Faults
) -> tuple[Sample, Image.Image] | None:
    """Returns the first sample that decodes, with its picture; None if none does."""
    for sample in samples:
        image = decode_sample(sample, size, faults)
        if image is not None:
            return sample, image
    return None


class FaultCounter:
    """Counts distinct damaged samples, names each once in the log, and stops when there are too many.

    Args:
        max_bad_samples: how many are tolerated.
        advice: what to do about them.
    """

    def __init__(self, max_bad_samples: int, advice: str = "`vflora data check` lists them all") -> None:
        self._advice = advice
        self._max_bad_samples = max_bad_samples
        self.faults: Faults = {}

    def add(self, faults: Faults) -> None:
        """Notes `faults`.

        Raises:
            UserError: more damaged samples than are tolerated, with their names.
        """
        for name, reason in faults.items():
            if name not in self.faults:
                self.faults[name] = reason
                logger.warning("Skipped %s (%s), %d so far.", name, reason, len(self.faults))
        if len(self.faults) > self._max_bad_samples:
            named = "; ".join(f"{name} ({reason})" for name, reason in list(self.faults.items())[:_NAMED])
            more = len(self.faults) - _NAMED
            raise UserError(
                f"{len(self.faults)} samples cannot be used, --max_bad_samples allows {self._max_bad_samples}: {named}"
                + (f" and {more} more" if more > 0 else "")
                + f"; {self._advice}."
            )
