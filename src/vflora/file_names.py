"""Names for files that must not take the place of others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path


def first_free(path: Path, is_free: Callable[[Path], bool] = lambda place: not place.exists()) -> Path:
    """Returns `path`, or where that is taken the same name with -2, -3, ... before its suffix.

    Args:
        path: the name that would be best.
        is_free: says whether a name may be used.
    """
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if is_free(place))
