"""Which pictures are kept, and which of them validate; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import imagehash
import numpy as np
from PIL import Image

from vflora.data.head_needs import PICTURES_TO_TRAIN, PICTURES_TO_VALIDATE
from vflora.data.sampling import keyed_random

_ROOM_FOR_A_PAIR = PICTURES_TO_TRAIN + PICTURES_TO_VALIDATE
"""Pictures of a character from which on two may validate."""


def perceptual_hash(image: Image.Image) -> int:
    """Returns 64 bits that hardly change when a picture is scaled, compressed or tinted (pHash, DCT based)."""
    bits = np.packbits(imagehash.phash(image).hash.flatten())
    return int.from_bytes(bits.tobytes(), "big")


def near_duplicates(hashes: Iterable[tuple[str, int]], distance: int) -> dict[str, str]:
    """Returns the names that are too much like one kept before them, each with that one; all others are kept.

    Args:
        hashes: names and perceptual hashes; the better pictures first.
        distance: in bits of 64; negative keeps everything.
    """
    kept: dict[str, int] = {}
    twins = {}
    for name, value in hashes:
        twin = next((kept_name for kept_name, other in kept.items() if (value ^ other).bit_count() <= distance), None)
        if twin is None:
            kept[name] = value
        else:
            twins[name] = twin
    return twins


def validation_keys(
    groups: Mapping[str, Sequence[str]], fraction: float, by: Literal["sample", "identity"], seed: int
) -> set[str]:
    """Chooses the samples that validate.

    Args:
        groups: character -> keys of its samples.
        fraction: part of all samples, or of all characters, in [0, 1).
        by: "sample" takes some of every character and never its last one; where that would be one of each, it takes
            two of some instead, and of two characters at least, as the head is judged by pairs; "identity" takes whole
            characters.
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
    if fraction > 0:
        counts = _in_pairs(counts, [name for name in by_remainder if len(groups[name]) >= _ROOM_FOR_A_PAIR])
    return {key for name in groups for key in shuffled[name][: counts[name]]}


def _in_pairs(counts: Mapping[str, int], roomy: Sequence[str]) -> Mapping[str, int]:
    """Holds two of one character out where one of each of two was, if no two characters have two otherwise.

    Where that would not make two of two characters either, two characters give two each, though it is more than was
    asked for: with less the head cannot be judged.

    Args:
        counts: how many pictures of each character validate.
        roomy: characters that can give two, the first ones first.
    """
    there = sum(count > 1 for count in counts.values())
    if there > 1:
        return counts
    single = [name for name in sorted(counts) if counts[name] == 1]
    takers = [name for name in roomy if counts[name] == 1][: len(single) // 2]
    if there + len(takers) < 2:
        takers = sorted((name for name in roomy if counts[name] < 2), key=lambda name: -counts[name])[: 2 - there]
    if there + len(takers) < 2:
        return counts
    givers = [name for name in single if name not in takers][: len(takers)]
    return {**counts, **dict.fromkeys(givers, 0), **dict.fromkeys(takers, 2)}
