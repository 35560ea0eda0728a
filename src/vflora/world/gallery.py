"""`vflora world render`: a sprite sheet, sample clips and what is true about them, for people to look at."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from vflora.errors import UserError
from vflora.random_streams import keyed_generator
from vflora.video_io import frame_grid, to_uint8_frames, write_mp4
from vflora.world.characters import (
    PATTERNS,
    PLAIN_GEOMETRIC,
    SHAPES,
    Domain,
    Split,
    character_count,
    character_name,
    split_ids,
)
from vflora.world.renderer import Clips, render
from vflora.world.scenes import DIRECTIONS, MOTIONS, SPEEDS, Scenes, prompts, sample_scenes
from vflora.world.sprite_sheet import sprite_sheet
from vflora.world.stills import write_still_folder

ENLARGEMENT = 4
"""Each pixel of a clip becomes a square of this side in the mp4, so that it is seen as it is."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RenderConfig:
    """What `vflora world render` shows."""

    output: Path
    """Folder to write."""
    domain: Literal["both", "geometric", "creatures"] = "both"
    """Which characters: geometric ones, which the base model knows, creatures, which a LoRA learns, or both."""
    split: Literal["train", "dev", "test", "general"] = "train"
    """Which creatures move in the clips and stand in the stills."""
    count: int = 8
    """Sample clips of each domain."""
    frames: int = 17
    """Frames of each clip."""
    size: int = 64
    """Side of the square frames in pixels."""
    stills: int = 0
    """Still pictures of every character of the split, as a folder for `vflora data pack`; 0 writes none."""
    seed: int = 0
    """Another seed shows other clips."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.frames < 1:
            raise UserError("--count and --frames must be 1 or more.")
        if self.size < 16:
            raise UserError(f"--size {self.size} is too small to see anything: use 16 or more.")
        if self.stills < 0:
            raise UserError("--stills must be 0 or more.")


def run(config: RenderConfig) -> None:
    """Writes the sheet, the clips, their frame grid and their ground truth for each domain.

    Raises:
        UserError: if the folder cannot hold the stills.
    """
    domains: tuple[Domain, ...] = ("geometric", "creatures") if config.domain == "both" else (config.domain,)
    config.output.mkdir(parents=True, exist_ok=True)
    for domain in domains:
        draw_sheet(domain).save(config.output / f"{domain}_characters.png")
        _write_clips(config, domain)
        if config.stills:
            write_still_folder(
                config.output / f"{domain}_stills_{config.split}",
                domain=domain,
                split=config.split,
                per_character=config.stills,
                seed=config.seed,
                size=config.size,
            )
    log.info("The world is in %s: open the *_characters.png and *_clips.png first.", config.output)


def draw_sheet(domain: Domain) -> Image.Image:
    """Draws the sprite sheet of a domain: each geometric shape true and bent, or creatures from each split."""
    if domain == "geometric":
        rows = []
        for shape, name in enumerate(SHAPES):
            true = range(shape * len(PATTERNS), (shape + 1) * len(PATTERNS))
            rows.append((name, [*true, *(PLAIN_GEOMETRIC * (1 + k) + character for k, character in enumerate(true))]))
        bent = character_count(domain) - PLAIN_GEOMETRIC
        subtitle = f"The {PLAIN_GEOMETRIC} of true shape and some of the {bent:,} bent ones, each in both limb phases."
        return sprite_sheet(rows, domain=domain, title="Geometric characters", subtitle=subtitle)
    rows = []
    splits: tuple[Split, ...] = ("train", "dev", "test", "general")
    for split, lines in zip(splits, (6, 2, 3, 3), strict=True):
        ids = split_ids(domain, split)
        # 11 is prime to the ten colours and four patterns, so that a row shows a mixture
        shown = [ids[(11 * k) % len(ids)] for k in range(6 * lines)]
        rows += [(split if line == 0 else "", shown[6 * line : 6 * line + 6]) for line in range(lines)]
    subtitle = f"A selection of the {character_count(domain):,} creatures, by split, each in both limb phases."
    return sprite_sheet(rows, domain=domain, title="Creatures", subtitle=subtitle)


def _write_clips(config: RenderConfig, domain: Domain) -> None:
    generator = keyed_generator(config.seed, "gallery", domain)
    scenes = sample_scenes(config.count, domain=domain, split=config.split, generator=generator, frames=config.frames)
    clips, sentences = render(scenes, size=config.size), prompts(scenes)
    folder = config.output / f"{domain}_clips"
    records = []
    for index, sentence in enumerate(tqdm(sentences, desc=f"{domain} clips", unit="clip")):
        frames = to_uint8_frames(clips.video[index])
        name = sentence.removeprefix("a ").removesuffix(".").replace(" ", "-")
        path = folder / f"{index:02d}-{name}.mp4"
        write_mp4(path, frames.repeat(ENLARGEMENT, axis=1).repeat(ENLARGEMENT, axis=2), fps=12, crf=12)
        records.append({"file": f"{folder.name}/{path.name}", **ground_truth(scenes, clips, index, sentence)})
    grid = frame_grid(list(clips.video), sentences, columns=9, cell_height=128)
    grid.save(config.output / f"{domain}_clips.png")
    (config.output / f"{domain}_clips.json").write_text(json.dumps(records, indent=1) + "\n")


def ground_truth(scenes: Scenes, clips: Clips, index: int, sentence: str) -> dict[str, Any]:
    """Returns what is true about a clip, ready for JSON; lengths in pixels, (x, y) with y down."""
    character = int(scenes.character[index])
    return {
        "prompt": sentence,
        "domain": scenes.domain,
        "character": character,
        "name": character_name(character, domain=scenes.domain),
        "motion": MOTIONS[int(scenes.motion[index])],
        "direction": DIRECTIONS[int(scenes.direction[index])],
        "speed": SPEEDS[int(scenes.speed[index])],
        "has_post": bool(scenes.post[index].isfinite()),
        "radius": round(float(scenes.radius[index]) * clips.video.shape[-1], 2),
        "centers": [[round(v, 2) for v in point] for point in clips.centers[index].tolist()],
        "phases": clips.phases[index].tolist(),
        "visible_pixels": [round(v, 1) for v in clips.mask[index].sum((1, 2)).tolist()],
    }
