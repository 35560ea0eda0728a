"""Where the pictures to pack come from: a folder per character, or a table of path and character."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vflora.data.images import SUFFIXES
from vflora.data.schema import canonical
from vflora.errors import UserError

logger = logging.getLogger(__name__)

PATH_COLUMN = "path"
CHARACTER_COLUMN = "character"
_CONVERTIBLE = {".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jxl"}
"""Pictures that are not read: the telephone's and others."""
_CAPTION_COLUMNS = {"caption", "text", "prompt"}
_REPEATS = re.compile(r"\d+_")
"""How kohya's folders say how often their pictures come."""


@dataclass(frozen=True, order=True)
class Source:
    """A picture file and the canonical name of the character it shows."""

    character: str
    path: Path


def read_sources(images: Path, metadata_key: str) -> list[Source]:
    """Lists the pictures to pack, sorted by character and path.

    Args:
        images: a folder with one folder, or link to one, per character (underscores in its name count as spaces), or a
            .csv or .jsonl file with the columns `path`, relative to the file, and `character` (or `metadata_key`).
        metadata_key: accepted as the name of the character column.

    Raises:
        UserError: nothing there, no character folders, a column missing, or no pictures.
    """
    if images.is_dir():
        found = _from_folders(images)
    elif not images.is_file():
        raise UserError(f"There is no folder or table {images}: give a folder with one folder per character.")
    elif images.suffix.lower() in (".csv", ".jsonl"):
        found = _from_table(images, metadata_key)
    else:
        raise UserError(f"{images} is neither a folder nor a .csv or .jsonl table: give one of these.")
    if not found:
        raise UserError(
            f"There are no {', '.join(SUFFIXES)} pictures in {images}: put them into one folder per character."
        )
    return sorted(set(found))


def _from_folders(images: Path) -> list[Source]:
    found, names, others = [], set(), []
    for path in _files(images):
        place = path.relative_to(images)
        if path.suffix.lower().lstrip(".") not in SUFFIXES:
            others.append(path)
        elif len(place.parts) == 1:
            raise UserError(f"{path} lies in no character's folder: move it into {images}/<character>/.")
        else:
            names.add(place.parts[0])
            found.append(Source(canonical(place.parts[0].replace("_", " ")), path))
    _name_left_out(images, {source.path.with_suffix("") for source in found}, others)
    _warn_of_repeats(names)
    return found


def _name_left_out(images: Path, pictures: Set[Path], others: Sequence[Path]) -> None:
    """Says what of a folder is not packed, and what could be.

    Args:
        images: the folder.
        pictures: what is packed, without suffixes.
        others: all other files.

    Raises:
        UserError: the only pictures there are of a kind that is not read.
    """
    captions = {path for path in others if path.suffix.lower() == ".txt" and path.with_suffix("") in pictures}
    if captions:
        logger.warning("%d captions (.txt) are not used: prompts come from --prompt_bank.", len(captions))
    kinds = Counter(path.suffix.lower() or "without a suffix" for path in others if path not in captions)
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    convertible = sorted(_CONVERTIBLE & kinds.keys())
    if convertible and not pictures:
        raise UserError(f"There are only {found} in {images}: convert {' and '.join(convertible)} to JPEG.")
    if kinds:
        logger.warning(
            "%d files in %s are no %s pictures and are left out (%s)%s.",
            kinds.total(),
            images,
            ", ".join(SUFFIXES),
            found,
            f": convert {' and '.join(convertible)} to JPEG" if convertible else "",
        )


def _files(images: Path) -> Iterator[Path]:
    """Lists what is not hidden, in the characters' folders and beside them.

    A character's folder may be a link. Links inside of one are not followed, so the way down always ends.
    """
    for entry in sorted(images.iterdir()):
        inside = entry.is_dir()
        if inside and entry.is_symlink() and images.resolve().is_relative_to(entry.resolve()):
            logger.warning("%s leads back to %s and is left out: link to a character's pictures.", entry, images)
            continue
        for path in sorted(entry.rglob("*")) if inside else [entry]:
            if any(part.startswith(".") for part in path.relative_to(images).parts):
                continue
            if path.is_file():
                yield path
            elif path.is_symlink():
                logger.warning("The link %s is not followed: copy here what it leads to.", path)


def _from_table(table: Path, metadata_key: str) -> list[Source]:
    rows = list(_csv_rows(table) if table.suffix.lower() == ".csv" else _jsonl_rows(table))
    found = [_from_row(table, line, row, metadata_key) for line, row in rows]
    columns = {column for _, row in rows for column in row}
    for column in sorted(_CAPTION_COLUMNS & columns - {metadata_key}):
        logger.warning("The column %r of %s is not used: prompts come from --prompt_bank.", column, table)
    _warn_of_repeats({source.character for source in found})
    return found


def _warn_of_repeats(names: Iterable[str]) -> None:
    if numbered := sorted(name for name in names if _REPEATS.match(name)):
        logger.warning(
            "Prompts will call characters by the numbers before their names too (%s): rename them as a prompt would "
            "call them; repeats have no use here.",
            ", ".join(numbered),
        )


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.DictReader(file), start=2)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV file in UTF-8 ({error}): save it as one.") from error


def _jsonl_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not a JSONL file in UTF-8 ({error}): save it as one.") from error
    for line, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"Line {line} of {table} is not JSON ({error}): write one object per line.") from error
        if not isinstance(row, dict):
            raise UserError(f"Line {line} of {table} is not a JSON object: write one object per line.")
        yield line, row


def _from_row(table: Path, line: int, row: dict[str, Any], metadata_key: str) -> Source:
    path = row.get(PATH_COLUMN)
    character = row.get(CHARACTER_COLUMN, row.get(metadata_key))
    if not isinstance(path, str) or not path or not isinstance(character, str) or not canonical(character):
        wanted = " or ".join(dict.fromkeys((repr(CHARACTER_COLUMN), repr(metadata_key))))
        raise UserError(
            f"Line {line} of {table} lacks text for {PATH_COLUMN!r} or for {wanted}: every line needs both, and "
            f"{_described(row)}."
        )
    return Source(canonical(character), table.parent / path)


def _described(row: Mapping[str | None, Any]) -> str:
    """Says which columns were found; what has more values than the table has columns is filed under None."""
    columns = [column for column in row if column is not None]
    for mark, name in ((";", "';'"), ("\t", "tabs")):
        if any(mark in column for column in columns):
            return f"this table looks separated by {name} where commas belong"
    return f"this one has the columns {', '.join(columns) or 'none'}"
