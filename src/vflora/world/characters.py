"""Who lives in the miniature world: names, splits and traits, all of them functions of a character's number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vflora.errors import UserError
from vflora.random_streams import keyed_seed
from vflora.world.drawing import Colour, from_hls, mix

Domain: TypeAlias = Literal["geometric", "creatures"]
Split: TypeAlias = Literal["train", "dev", "test", "general"]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.55, 0.80),
    "coral": (0.045, 0.63, 0.88),
    "gold": (0.125, 0.56, 0.90),
    "lime": (0.225, 0.52, 0.66),
    "green": (0.38, 0.40, 0.48),
    "teal": (0.49, 0.42, 0.62),
    "blue": (0.59, 0.52, 0.72),
    "violet": (0.735, 0.57, 0.56),
    "pink": (0.915, 0.70, 0.82),
    "brown": (0.065, 0.37, 0.40),
}
"""Hue, lightness and saturation of each colour word."""

PATTERNS = ("plain", "striped", "spotted", "banded")
SHAPES = (
    "circle", "square", "triangle", "star", "diamond", "hexagon",
    "heart", "flower", "cross", "house", "drop", "cloud",
)  # fmt: skip
NICKNAMES = (
    "bimble", "bobbin", "bumble", "chuffle", "dibble", "doodle", "fizzle", "flump", "gloop", "gogo",
    "grumble", "hobnob", "jigget", "kibble", "lumo", "mimzy", "momo", "muffin", "nibbin", "noodle",
    "pipkin", "plonk", "poffle", "puddle", "quibble", "rumpus", "sniffle", "snork", "squib", "tatter",
    "tiggle", "tumtum", "twill", "waddle", "wibble", "wompo", "yakko", "yoyo", "zibbit", "zuzu",
)  # fmt: skip

PLAIN_GEOMETRIC = len(SHAPES) * len(PATTERNS)
"""The 48 geometric characters of true shape; those after them are bent and stretched."""

_SPLITS: dict[Domain, dict[Split, range]] = {
    "geometric": {
        "train": range(PLAIN_GEOMETRIC),
        "dev": range(PLAIN_GEOMETRIC),
        "test": range(PLAIN_GEOMETRIC),
        "general": range(40 * PLAIN_GEOMETRIC),
    },
    "creatures": {
        "train": range(0, 384),
        "dev": range(384, 448),
        "test": range(448, 576),
        "general": range(576, 1600),
    },
}


def character_count(domain: Domain) -> int:
    """Returns how many characters a domain has: 1,920 geometric ones, 1,600 creatures."""
    if domain not in _SPLITS:
        raise UserError(f"there is no domain {domain!r}: use geometric or creatures.")
    return _SPLITS[domain]["general"].stop


def split_ids(domain: Domain, split: Split) -> range:
    """Returns the characters of a split.

    Creatures are split by identity: `train` for LoRA and head, `dev` for tuning, `test` for grading, and
    `general` for whatever must know creatures in general without having met those (VAE, grader). Of the geometric
    characters, the 48 of true shape are in every split, and `general` has all the bent ones too.

    Raises:
        UserError: for an unknown domain or split.
    """
    character_count(domain)
    if split not in _SPLITS[domain]:
        raise UserError(f"there is no split {split!r}: use train, dev, test or general.")
    return _SPLITS[domain][split]


def character_name(character: int, *, domain: Domain) -> str:
    """Returns the name, for example "teal striped star" or "gold spotted momo".

    It is unique but for geometric characters from number 480 on, who are the bent namesakes of earlier ones.
    """
    if domain == "geometric":
        variant, plain = divmod(character, PLAIN_GEOMETRIC)
        shape, pattern = divmod(plain, len(PATTERNS))
        colour = (3 * shape + 7 * pattern + variant) % len(COLOURS)
        return f"{list(COLOURS)[colour]} {PATTERNS[pattern]} {SHAPES[shape]}"
    mark, generation = character % 40, character // 40
    colour, pattern = mark % 10, mark // 10
    # for one colour and pattern the nickname walks through all forty, so that no name comes twice
    return f"{list(COLOURS)[colour]} {PATTERNS[pattern]} {NICKNAMES[(7 * mark + generation) % 40]}"


@dataclass(frozen=True)
class Traits:
    """What a character looks like, apart from the outline of its body.

    Attributes:
        bent: whether its shape is bent and stretched at random.
        colour, pattern, body: the words of its name.
        main, accent, pale, ink: colours of the body, of pattern and limbs, of belly, of outline and eyes.
        rng: a generator for everything else; it is at the same state for the same character.
    """

    bent: bool
    colour: str
    pattern: str
    body: str
    main: Colour
    accent: Colour
    pale: Colour
    ink: Colour
    rng: random.Random


def traits_of(character: int, *, domain: Domain) -> Traits:
    """Returns the traits of a character.

    Raises:
        UserError: if the domain has no such character.
    """
    if not 0 <= character < character_count(domain):
        raise UserError(f"{domain} has no character {character}: use 0 to {character_count(domain) - 1}.")
    colour, pattern, body = character_name(character, domain=domain).split()
    rng = random.Random(keyed_seed("world", "character", domain, character))
    hue, lightness, saturation = COLOURS[colour]
    if domain == "creatures":
        hue += rng.uniform(-0.018, 0.018)
        lightness += rng.uniform(-0.04, 0.04)
    main = from_hls(hue, lightness, saturation)
    turn = rng.choice((0.12, 0.2, 0.33, 0.42, 0.5, 0.58, 0.67, 0.8, 0.88))
    accent_lightness = lightness - 0.2 if lightness > 0.52 else lightness + 0.26
    accent = from_hls(hue + turn, accent_lightness, 0.68)
    return Traits(
        domain == "geometric" and character >= PLAIN_GEOMETRIC,
        colour,
        pattern,
        body,
        main,
        accent,
        pale=mix(main, (1.0, 0.97, 0.90), 0.62),
        ink=from_hls(hue + 0.05, 0.13, 0.35),
        rng=rng,
    )
