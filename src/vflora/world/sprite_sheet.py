"""Draws sprite sheets: characters on soft cards, both limb phases side by side, with their names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from vflora.world.bodies import draw_character
from vflora.world.characters import Domain, character_name

PAPER = (250, 248, 244)
CARD = (233, 236, 232)
INK = (52, 52, 60)
FAINT = (124, 126, 130)
_SPRITE = 120
_PADDING = 14
_GAP = 18
_MARGIN = 48
_CARD_SIZE = (2 * _SPRITE + 3 * _PADDING, _SPRITE + 2 * _PADDING + 26)
_LABEL_WIDTH = 128


def sprite_sheet(
    rows: Sequence[tuple[str, Sequence[int]]], *, domain: Domain, title: str, subtitle: str
) -> Image.Image:
    """Draws a sheet with a row of cards for each label.

    Args:
        rows: labels, and the characters of each row.
        domain: geometric characters or creatures.
        title: large, on top.
        subtitle: small, below it.

    Returns:
        An RGB picture.
    """
    columns = max(len(characters) for _, characters in rows)
    width = 2 * _MARGIN + _LABEL_WIDTH + columns * (_CARD_SIZE[0] + _GAP) - _GAP
    top = _MARGIN + 96
    height = top + len(rows) * (_CARD_SIZE[1] + _GAP) - _GAP + _MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 8), title, fill=INK, font=ImageFont.load_default(size=40))
    draw.text((_MARGIN, _MARGIN + 46), subtitle, fill=FAINT, font=ImageFont.load_default(size=19))
    for number, (label, characters) in enumerate(rows):
        y = top + number * (_CARD_SIZE[1] + _GAP)
        font = ImageFont.load_default(size=21)
        draw.text((_MARGIN, y + _CARD_SIZE[1] // 2), label, fill=INK, font=font, anchor="lm")
        for column, character in enumerate(characters):
            x = _MARGIN + _LABEL_WIDTH + column * (_CARD_SIZE[0] + _GAP)
            _draw_card(sheet, draw, (x, y), character, domain)
    return sheet


def _draw_card(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], character: int, domain: Domain
) -> None:
    x, y = corner
    width, height = _CARD_SIZE
    draw.rounded_rectangle((x, y, x + width, y + height), radius=16, fill=CARD)
    for phase, drawing in enumerate(draw_character(character, domain=domain, size=_SPRITE)):
        sheet.paste(_to_image(drawing), (x + _PADDING + phase * (_SPRITE + _PADDING), y + _PADDING))
    name = character_name(character, domain=domain)
    font = ImageFont.load_default(size=16)
    draw.text((x + width // 2, y + height - 20), name, fill=FAINT, font=font, anchor="mm")


def _to_image(drawing: torch.Tensor) -> Image.Image:
    card = torch.tensor(CARD).view(3, 1, 1) / 255
    colours = drawing[:3] + (1 - drawing[3:]) * card
    return Image.fromarray((colours * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
