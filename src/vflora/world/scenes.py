"""What happens in a clip: who moves where, how, and in front of what.

A scene is a handful of numbers; the renderer turns it into pixels, and `prompts` into words. The words decide
the path exactly: the same motion, direction and speed always give the same path from the same start.
Lengths are shares of the frame's side, so that a scene can be rendered at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Self

import torch
from torch import Tensor

from vflora.errors import UserError
from vflora.world.backgrounds import sample_backgrounds
from vflora.world.characters import (
    COLOURS,
    NICKNAMES,
    PATTERNS,
    SHAPES,
    Domain,
    Split,
    character_name,
    split_ids,
)

MOTIONS = ("slides", "hops", "circles", "zigzags")
DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
_DIRECTION_PHRASES = ("to the left", "to the right", "up", "down")

VOCABULARY: tuple[str, ...] = (
    "a", "to", "the",
    *MOTIONS, *DIRECTIONS, *SPEEDS, *COLOURS, *PATTERNS, *SHAPES, *NICKNAMES,
)  # fmt: skip
"""Every word of every prompt."""

HEADINGS = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
"""Unit vector (x, y) of each direction, y down."""
TRAVEL = torch.tensor([16.0, 24.0]) / 64
"""How far a clip leads at each speed."""
SWING = torch.tensor([0.0, 6.0, 4.5, 5.0]) / 64
"""How far each motion leaves the straight line: height of a hop, radius of a circle, half width of a zigzag."""
ROUNDS = torch.tensor([[1.0, 1.0], [2.0, 4.0], [1.0, 2.0], [1.0, 2.0]])
"""Hops, circles or zigzags in a clip, for each motion and speed."""
HOLD_FRAMES = torch.tensor([4, 2])
"""Frames that a limb phase lasts at each speed."""
POST_HALF_WIDTH = 2.0 / 64
POST_RADIUS = 11.0 / 64
"""Largest character that passes a post: a clip is too short for a larger one to come out behind it."""
_MARGIN = 1.0 / 64


@dataclass(frozen=True)
class Scenes:
    """Parameters of B clips.

    Attributes:
        domain: "geometric" or "creatures", for all of them.
        frames: frames of each clip.
        character: numbers within the domain, int64 [B].
        motion, direction, speed: indices into MOTIONS, DIRECTIONS and SPEEDS, int64 [B].
        start: where the character stands in frame 0, (x, y) [B, 2].
        radius: half the character's size [B].
        tilt, spin: rotation in frame 0 and what the whole clip adds, in radians [B].
        phase: limb phase of frame 0, 0 or 1, int64 [B].
        post: distance from the start, along the way, to a post that hides what passes behind it; inf for none [B].
        backdrop: numbers of the background [B, K], see `vflora.world.backgrounds`.
    """

    domain: Domain
    frames: int
    character: Tensor
    motion: Tensor
    direction: Tensor
    speed: Tensor
    start: Tensor
    radius: Tensor
    tilt: Tensor
    spin: Tensor
    phase: Tensor
    post: Tensor
    backdrop: Tensor

    def __len__(self) -> int:
        return self.character.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """Returns the scenes with all tensors on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def select(self, index: Tensor | slice | Sequence[int]) -> Self:
        """Returns some of the scenes."""
        rows = index if isinstance(index, slice) else torch.as_tensor(index)
        return replace(self, **{name: value[rows] for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def sample_scenes(
    count: int,
    *,
    domain: Domain,
    split: Split,
    generator: torch.Generator,
    frames: int = 17,
    posts: float = 0.15,
) -> Scenes:
    """Draws scenes in which the character stays in the frame.

    Args:
        count: scenes to draw.
        domain: geometric characters or creatures.
        split: which of them, see `split_ids`.
        generator: a CPU generator; equal states give equal scenes.
        frames: frames of each clip; paths have the same length whatever it is.
        posts: share of the quick scenes that have a post which hides the character for a while, late in the clip.

    Raises:
        UserError: for a bad count, number of frames, domain or split.
    """
    if count < 1 or frames < 1:
        raise UserError(f"{count} scenes of {frames} frames cannot be drawn: give one or more of both.")

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def choice(options: int) -> Tensor:
        return torch.randint(options, (count,), generator=generator)

    ids = split_ids(domain, split)
    character = ids.start + choice(len(ids))
    motion, direction, speed = choice(len(MOTIONS)), choice(len(DIRECTIONS)), choice(len(SPEEDS))
    radius = uniform(11.0, 14.0) / 64
    low, high = reach(motion, direction, speed)
    room = torch.rand(count, 2, generator=generator)
    first = radius[:, None] + _MARGIN - low
    last = 1 - radius[:, None] - _MARGIN - high
    post = _sample_posts(uniform(0, 1), radius, motion, speed, posts)
    return Scenes(
        domain=domain,
        frames=frames,
        character=character,
        motion=motion,
        direction=direction,
        speed=speed,
        start=first + (last - first) * room,
        radius=torch.where(post.isfinite(), radius.clamp_max(POST_RADIUS), radius),
        tilt=uniform(-0.2, 0.2),
        spin=uniform(-0.35, 0.35),
        phase=choice(2),
        post=post,
        backdrop=sample_backgrounds(count, generator),
    )


def _sample_posts(dice: Tensor, radius: Tensor, motion: Tensor, speed: Tensor, share: float) -> Tensor:
    distance = radius.clamp_max(POST_RADIUS) + POST_HALF_WIDTH + 1.5 / 64
    possible = (speed == 1) & (motion != MOTIONS.index("circles"))
    return torch.where(possible & (dice < share), distance, torch.inf)


def paths(motion: Tensor, direction: Tensor, speed: Tensor, frames: int) -> Tensor:
    """Returns where each frame finds the character, relative to its start.

    Args:
        motion: index into MOTIONS [B].
        direction: index into DIRECTIONS [B].
        speed: index into SPEEDS [B].
        frames: F.

    Returns:
        (x, y) [B, F, 2] in shares of the frame's side.
    """
    device = motion.device
    along = HEADINGS.to(device)[direction]
    # across is up for a sideways path and right for an upright one
    across = torch.where(direction[:, None] < 2, HEADINGS[2].to(device), HEADINGS[1].to(device))
    time = torch.linspace(0, 1, frames, device=device) if frames > 1 else torch.zeros(1, device=device)
    turns = ROUNDS.to(device)[motion, speed][:, None] * time
    swing = SWING.to(device)[motion][:, None]
    angle = math.tau * turns
    hop = torch.sin(math.pi * turns).abs()
    zigzag = 1 - 4 * ((turns - 0.25) % 1 - 0.5).abs()
    none = torch.zeros_like(turns)
    sideways = torch.stack([none, hop, 1 - torch.cos(angle), zigzag])
    onward = torch.stack([none, none, torch.sin(angle), none])
    row = torch.arange(len(motion), device=device)
    travel = TRAVEL.to(device)[speed][:, None] * time + swing * onward[motion, row]
    return travel[..., None] * along[:, None] + (swing * sideways[motion, row])[..., None] * across[:, None]


def reach(motion: Tensor, direction: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the lowest and highest (x, y) of each path relative to its start, both [B, 2]."""
    low, high = (bounds.to(motion.device) for bounds in _reaches())
    return low[motion, direction, speed], high[motion, direction, speed]


@cache
def _reaches() -> tuple[Tensor, Tensor]:
    """Returns what `reach` does for every motion, direction and speed there is."""
    words = (len(MOTIONS), len(DIRECTIONS), len(SPEEDS))
    every = torch.cartesian_prod(*(torch.arange(count) for count in words))
    path = paths(*every.unbind(1), 129)
    return path.amin(1).view(*words, 2), path.amax(1).view(*words, 2)


def limb_phases(scenes: Scenes) -> Tensor:
    """Returns the limb phase of every frame, int64 [B, F].

    Frame 0 shows the scene's phase; the limbs change right after it and then every `HOLD_FRAMES` frames.
    """
    time = torch.arange(scenes.frames, device=scenes.phase.device)
    hold = HOLD_FRAMES.to(scenes.phase.device)[scenes.speed][:, None]
    return (scenes.phase[:, None] + (time + hold - 1) // hold) % 2


def motion_prompt(name: str, motion: str, direction: str, speed: str) -> str:
    """Returns the sentence for a character's name and three motion words.

    Raises:
        UserError: if a word is none of MOTIONS, DIRECTIONS or SPEEDS.
    """
    for word, known in ((motion, MOTIONS), (direction, DIRECTIONS), (speed, SPEEDS)):
        if word not in known:
            raise UserError(f"no scene {word!r}: use one of {', '.join(known)}.")
    return f"a {name} {motion} {_DIRECTION_PHRASES[DIRECTIONS.index(direction)]} {speed}."


def prompts(scenes: Scenes) -> list[str]:
    """Returns a sentence for every scene, for example "a red striped star hops to the right slowly."."""
    return [
        motion_prompt(
            character_name(character, domain=scenes.domain), MOTIONS[motion], DIRECTIONS[direction], SPEEDS[speed]
        )
        for character, motion, direction, speed in zip(
            scenes.character.tolist(),
            scenes.motion.tolist(),
            scenes.direction.tolist(),
            scenes.speed.tolist(),
            strict=True,
        )
    ]
