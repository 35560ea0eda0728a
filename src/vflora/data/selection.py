"""Which pictures are kept, and which of them validate; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import imagehash
import numpy as np
from PIL import Image

from vflora.data.sampling import keyed_random


def perceptual_hash(image: Image.Image) -> int:
    """Returns 64 bits that hardly change when a picture is scaled, compressed or tinted (pHash, DCT based)."""
    bits = np.packbits(imagehash.phash(image).hash.flatten())
    return int.from_bytes(bits.tobytes(), "big")


def without_near_duplicates(hashes: Iterable[tuple[str, int]], distance: int) -> list[str]:
    """Returns the names whose hash is more than `distance` bits away from every one kept before it.

    Args:
        hashes: names and perceptual hashes; the better pictures first.
        distance: in bits of 64; negative keeps everything.
    """
    kept: dict[str, int] = {}
    for name, value in hashes:
        if all((value ^ other).bit_count() > distance for other in kept.values()):
            kept[name] = value
    return list(kept)


def validation_keys(
    groups: Mapping[str, Sequence[str]], fraction: float, by: Literal["sample", "identity"], seed: int
) -> set[str]:
    """Chooses the samples that validate.

    Args:
        groups: character -> keys of its samples.
        fraction: part of all samples, or of all characters, in [0, 1).
        by: "sample" takes some of every character and never its last one; "identity" takes whole characters.
        seed: decides which.
    """
    if by == "identity":
        names = sorted(groups)
        keyed_random(seed, "validation identities").shuffle(names)
        most = len(names) - 1
        count = min(most, max(1, round(fraction * len(names)))) if fraction > 0 else 0
        return {key for name in names[:count] for key in groups[name]}
    shuffled = {}
    for name, keys in groups.items():
        shuffled[name] = sorted(keys)
        keyed_random(seed, "validation samples", name).shuffle(shuffled[name])
    wanted = {name: fraction * len(keys) for name, keys in groups.items()}
    counts = {name: int(wanted[name]) for name in groups}
    # Shares below one picture add up; they go to the characters that were rounded down most.
    missing = round(sum(wanted.values())) - sum(counts.values())
    by_remainder = sorted(groups, key=lambda name: (counts[name] - wanted[name], keyed_random(seed, name).random()))
    for name in by_remainder:
        if missing > 0 and counts[name] + 1 < len(groups[name]):
            counts[name] += 1
            missing -= 1
    return {key for name in groups for key in shuffled[name][: counts[name]]}
