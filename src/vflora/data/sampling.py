"""Which samples are taken, and with what beside them; pure, every random number from a generator that is passed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

from vflora.data.shards import Sample
from vflora.errors import UserError
from vflora.random_streams import keyed_seed

_REMEMBERED_PER_CHARACTER = 8


def keyed_random(*key: int | str) -> Random:
    """Returns Python's generator for `key`: cheaper per number than torch's, and what webdataset's stages take."""
    return Random(keyed_seed(*key))


@dataclass(frozen=True)
class Acceptance:
    """Inverse-frequency acceptance, p = min(1, min_count / count(character)).

    Every character is then seen about equally often, and a frequent one still shows all its pictures over time,
    because the number that decides is drawn anew for each sample.

    Attributes:
        counts: samples per character.
    """

    counts: Mapping[str, int]

    @cached_property
    def _fewest(self) -> int:
        return min(self.counts.values())

    def probability(self, character: str) -> float:
        """Returns the chance that a sample of `character` is taken."""
        return min(1.0, self._fewest / self.counts[character])

    def accepts(self, character: str, generator: Random) -> bool:
        """Draws one number and decides."""
        return generator.random() < self.probability(character)

    def accepts_key(self, character: str, key: str, seed: int) -> bool:
        """Decides by the sample's own name, so that validation always sees the same samples."""
        return keyed_random(seed, "acceptance", key).random() < self.probability(character)


class SecondaryCache:
    """The latest samples of the characters seen last, from which an anchor other than the reference is drawn.

    Holds places in shards, never pictures.

    Args:
        max_characters: characters that are remembered; the one not seen for the longest time goes first.
    """

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._seen: OrderedDict[str, OrderedDict[str, Sample]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def draw(self, sample: Sample, generator: Random) -> Sample | None:
        """Returns another picture of the same character; None if none is remembered."""
        others = [other for key, other in self._seen.get(sample.label, {}).items() if key != sample.key]
        return generator.choice(others) if others else None

    def remember(self, sample: Sample) -> None:
        """Notes that `sample` was used."""
        latest = self._seen.setdefault(sample.label, OrderedDict())
        latest[sample.key] = sample
        latest.move_to_end(sample.key)
        if len(latest) > _REMEMBERED_PER_CHARACTER:
            latest.popitem(last=False)
        self._seen.move_to_end(sample.label)
        if len(self._seen) > self._max_characters:
            self._seen.popitem(last=False)


@dataclass(frozen=True)
class Draw:
    """One place of a batch before decoding: the reference, and the other picture of its character if one was drawn."""

    sample: Sample
    secondary: Sample | None


def accept(samples: Iterator[Sample], acceptance: Acceptance, generator: Random) -> Iterator[Sample]:
    """Thins a stream of samples out by inverse frequency."""
    return (sample for sample in samples if acceptance.accepts(sample.label, generator))


def attach_secondary(
    samples: Iterator[Sample], p_secondary: float, max_characters: int, generator: Random
) -> Iterator[Draw]:
    """Attaches, with probability `p_secondary`, another picture of the same character that came by earlier."""
    cache = SecondaryCache(max_characters)
    for sample in samples:
        wanted = generator.random() < p_secondary
        yield Draw(sample, cache.draw(sample, generator) if wanted else None)
        cache.remember(sample)


def crop_box(size: tuple[int, int], ratio: float, jitter: float, generator: Random) -> tuple[int, int, int, int]:
    """Draws a crop that shortens the long side only.

    Args:
        size: height and width.
        ratio: part of the long side that is kept on average.
        jitter: the part kept is uniform in ratio - jitter to ratio + jitter, at most 1.
        generator: draws the part first and the place of the crop second.

    Returns:
        left, top, right, bottom in pixels. For a square, the width counts as the long side.
    """
    height, width = size
    longest = max(height, width)
    kept = max(1, round(longest * min(1.0, generator.uniform(ratio - jitter, ratio + jitter))))
    start = generator.randint(0, longest - kept)
    if width >= height:
        return start, 0, start + kept, height
    return 0, start, width, start + kept


@dataclass(frozen=True)
class IdentityBatches:
    """P identities with K samples each, a pure function of the batch's number: there is no state to save.

    In every epoch each identity comes at most once, in a new order. Over the epochs an identity walks through its
    samples without repeating one, up to `max_per_identity` of them, then through a newly drawn selection.

    Attributes:
        pools: samples of each identity; identities with fewer than `instances` must have been left out.
        identities: P, per process.
        instances: K.
        max_per_identity: samples of one identity in one walk.
        seed: with the batch's number, decides everything.
        rank: this process.
        world_size: all processes; they get different identities.
    """

    pools: Mapping[int, Sequence[Sample]]
    identities: int
    instances: int
    max_per_identity: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """Checks that one batch can be filled.

        Raises:
            UserError: with the flag to change.
        """
        if self.instances < 2:
            raise UserError(f"--pk_instances {self.instances} leaves no pairs: use 2 or more.")
        if self.max_per_identity < self.instances:
            raise UserError(
                f"--max_per_identity {self.max_per_identity} is below --pk_instances {self.instances}: raise it."
            )
        most = len(self.pools) // self.world_size
        if most < 2:
            raise UserError(
                f"only {len(self.pools)} identities have {self.instances} or more pictures, which is too few for a "
                f"batch on each of {self.world_size} process(es), two for each: add characters with so many pictures, "
                "or lower --pk_instances."
            )
        if not 2 <= self.identities * self.world_size <= len(self.pools):
            raise UserError(
                f"--pk_identities {self.identities} on {self.world_size} process(es) does not fit the "
                f"{len(self.pools)} identities with {self.instances} or more pictures: use 2 to "
                f"{most}, or lower --pk_instances."
            )

    def batch(self, number: int) -> list[Sample]:
        """Returns the P*K samples of a batch, identity by identity."""
        everywhere = self.identities * self.world_size
        epoch, place = divmod(number, len(self.pools) // everywhere)
        order = sorted(self.pools)
        keyed_random(self.seed, "identities", epoch).shuffle(order)
        first = place * everywhere + self.rank * self.identities
        chosen = order[first : first + self.identities]
        return [sample for identity in chosen for sample in self._instances(identity, epoch)]

    def _instances(self, identity: int, visit: int) -> list[Sample]:
        pool = self.pools[identity]
        walk, place = divmod(visit, min(len(pool), self.max_per_identity) // self.instances)
        selection = list(pool)
        keyed_random(self.seed, "instances", identity, walk).shuffle(selection)
        return selection[place * self.instances : (place + 1) * self.instances]
