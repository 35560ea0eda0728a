"""The rows of a comparison: a picture, whom it shows, a prompt and a seed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vflora.config import PromptConfig
from vflora.data.images import SUFFIXES
from vflora.errors import UserError
from vflora.inference import open_image
from vflora.prompts import prompt_maker
from vflora.random_streams import keyed_generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One row to make.

    Attributes:
        character: name to show.
        picture: reference, RGB.
        prompt: what happens.
        seed: of the starting noise.
    """

    character: str
    picture: Image.Image
    prompt: str
    seed: int


def find_samples(
    images: Sequence[Path],
    *,
    prompts: Sequence[str] | None,
    prompt_bank: Path | None,
    seeds: Sequence[int],
    max_rows: int,
) -> list[Sample]:
    """Opens the pictures and gives each its prompt and seeds.

    Args:
        images: pictures, or folders of them, or folders of one folder per character (its first picture counts).
        prompts: one for all pictures, or one for each; {character} is replaced. None draws from the bank.
        prompt_bank: None for the one that ships with the package.
        seeds: every picture comes once with each.
        max_rows: what is beyond is left out, with a warning in the log.

    Raises:
        UserError: if there is no picture, one cannot be read, or the number of prompts does not fit.
    """
    found = [pair for path in images for pair in _pictures(path)]
    if not found:
        raise UserError(f"There are no pictures in {', '.join(map(str, images))}: give JPEG, PNG or WebP files.")
    if prompts and len(prompts) not in (1, len(found)):
        raise UserError(f"--prompts has {len(prompts)} texts for {len(found)} pictures: give one, or as many.")
    draw = prompt_maker(PromptConfig(prompt_bank=prompt_bank))
    samples = []
    for index, (character, path) in enumerate(found):
        if prompts:
            template = prompts[index if len(prompts) > 1 else 0]
            prompt = template.replace("{character}", character)
        else:
            prompt = draw(character, keyed_generator("compare", character, index))
        for seed in seeds:
            if len(samples) < max_rows:
                samples.append(Sample(character, open_image(path, "--images"), prompt, seed))
    left_out = len(found) * len(seeds) - len(samples)
    if left_out:
        log.warning("%d rows are left out: raise --max_rows to see them", left_out)
    return samples


def _pictures(path: Path) -> list[tuple[str, Path]]:
    """Returns (character, picture): the file itself, those in a folder, or the first one of each folder in it."""
    if not path.is_dir():
        return [(readable(path.stem), path)]
    here = _picture_files(path)
    if here:
        return [(readable(file.stem), file) for file in here]
    folders = sorted(folder for folder in _seen(path) if folder.is_dir())
    return [(readable(folder.name), file) for folder in folders for file in _picture_files(folder)[:1]]


def _picture_files(folder: Path) -> list[Path]:
    return sorted(file for file in _seen(folder) if file.suffix.lower().lstrip(".") in SUFFIXES)


def _seen(folder: Path) -> list[Path]:
    """What is in a folder but for hidden things, such as the `._0.png` that macOS puts beside a 0.png."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def readable(name: str) -> str:
    """Returns a file name as words."""
    return " ".join(re.split(r"[_\s]+", name)).strip()
