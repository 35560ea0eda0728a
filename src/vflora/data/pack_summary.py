"""What `vflora data pack` says when it is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vflora.data.head_needs import missing_for_the_head

_CHARACTERS_NAMED = 10
_FILES_NAMED = 3
_MUCH_CROPPED = 0.25
"""Part of a picture's area that may be cut off without a word."""
_MUCH_ENLARGED = 4.0
"""How many times larger a picture's sides may become without its name being told."""


@dataclass(frozen=True)
class PackSummary:
    """What came out.

    Attributes:
        size: height and width of all pictures.
        counts: split -> character -> pictures.
        twins: each file that was left out as a near-duplicate, and the file that it looks like.
        unreadable: file -> why it was left out.
        lost: packed file -> part of its area that was cut off.
        scales: packed file -> how many times larger its sides became.
    """

    size: tuple[int, int]
    counts: Mapping[str, Mapping[str, int]]
    twins: Sequence[tuple[str, str]]
    unreadable: Mapping[str, str]
    lost: Mapping[str, float]
    scales: Mapping[str, float]

    @property
    def duplicates(self) -> int:
        """How many near-duplicates were left out."""
        return len(self.twins)

    @property
    def enlarged(self) -> int:
        """How many pictures had to be enlarged."""
        return sum(scale > 1 for scale in self.scales.values())

    def lines(self) -> list[str]:
        """Returns the summary as text."""
        characters = Counter[str]()
        for counts in self.counts.values():
            characters.update(counts)
        text = [f"{characters.total()} pictures of {len(characters)} characters, {self.size[0]}x{self.size[1]}"]
        named = [f"{name} {count}" for name, count in sorted(characters.items())]
        text.append(f"  {', '.join(_first(named, _CHARACTERS_NAMED))}")
        for split, counts in self.counts.items():
            text.append(f"  {split:5} {sum(counts.values()):7} pictures, {len(counts)} characters")
        text.append(f"  left out: {self.duplicates} near-duplicates, {len(self.unreadable)} unreadable")
        alike = [f"{left_out} looks like {kept}" for left_out, kept in self.twins]
        text += [f"    {line}" for line in _first(alike, _FILES_NAMED)]
        return [*text, *self._cropping(), *self._enlarging(), *missing_for_the_head(self.counts)]

    def _cropping(self) -> list[str]:
        much = {file: part for file, part in self.lost.items() if part > _MUCH_CROPPED}
        if not much:
            return []
        worst = max(much, key=lambda file: much[file])
        return [
            f"  cropped: {len(much)} pictures lose more than a quarter of their area, {worst} most "
            f"({much[worst]:.0%}): pack with --fit pad to keep all of them, or crop them yourself"
        ]

    def _enlarging(self) -> list[str]:
        lines = []
        if self.enlarged:
            lines.append(
                f"  enlarged: {self.enlarged} pictures that are smaller than {self.size[0]}x{self.size[1]}; the LoRA "
                "learns their softness too: get larger ones, or pack at a lower --resolution"
            )
        much = {file: scale for file, scale in self.scales.items() if scale > _MUCH_ENLARGED}
        named = [f"{file} ({much[file]:.1f} times)" for file in sorted(much, key=lambda file: -much[file])]
        if named:
            lines.append(f"  enlarged far too much, so leave them out: {', '.join(_first(named, _FILES_NAMED))}")
        return lines


def _first(items: Sequence[str], most: int) -> list[str]:
    return [*items[:most], *([f"and {len(items) - most} more"] if len(items) > most else [])]
