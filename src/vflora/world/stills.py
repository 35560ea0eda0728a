"""Writes pictures of characters as a folder that `vflora data pack` reads: one folder for each character."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from vflora.errors import UserError
from vflora.random_streams import keyed_generator
from vflora.world.characters import Domain, Split, character_name, split_ids
from vflora.world.renderer import render_stills


def write_still_folder(
    output: str | Path,
    *,
    domain: Domain,
    split: Split,
    per_character: int,
    seed: int,
    size: int = 64,
    limit: int | None = None,
) -> Path:
    """Writes `OUTPUT/NAME/00.png ...`: every picture in another place, size, pose and light.

    Args:
        output: folder to write; it must not hold a still folder yet.
        domain: geometric characters or creatures.
        split: which of them, see `split_ids`.
        per_character: pictures of each character.
        seed: equal seeds give equal pictures; a character's do not depend on which others are written.
        size: side of the pictures in pixels.
        limit: write only the first characters of the split.

    Returns:
        The folder.

    Raises:
        UserError: if the folder is not empty, or nothing would be written.
    """
    folder = Path(output)
    if per_character < 1 or (limit is not None and limit < 1):
        raise UserError("no picture would be written: give at least one character and one picture of each.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: name a new folder for the pictures.")
    for character in tqdm(split_ids(domain, split)[:limit], desc="stills", unit="character"):
        generator = keyed_generator(seed, "stills", domain, character)
        numbers = torch.full((per_character,), character)
        pictures = render_stills(numbers, domain=domain, generator=generator, size=size)
        colours = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        place = folder / character_name(character, domain=domain)
        place.mkdir(parents=True)
        for number, picture in enumerate(colours):
            Image.fromarray(picture).save(place / f"{number:02d}.png")
    return folder
