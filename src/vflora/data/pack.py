"""`vflora data pack`: pictures of characters -> shards and manifests, one data set for both trainings."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from tqdm import tqdm

from vflora.atomic import require_writable
from vflora.data.decoding import FaultCounter
from vflora.data.images import MAX_MEGAPIXELS, BadImageError, decode, fit, upright_size
from vflora.data.pack_summary import PackSummary
from vflora.data.sampling import keyed_random
from vflora.data.schema import COUNT_KEY, IDENTITY_KEY, SPLITS, manifest_path
from vflora.data.selection import near_duplicates, perceptual_hash, validation_keys
from vflora.data.sizes import BUCKETS, bucket_size, parse_size
from vflora.data.sources import Source, read_sources
from vflora.data.writing import encode, write_manifest, write_shards
from vflora.errors import UserError

_SLUG_LENGTH = 40

T = TypeVar("T")


@dataclass(frozen=True)
class PackConfig:
    """What to pack, and how."""

    images: Path
    """Folder with one folder per character, or a .csv or .jsonl table with the columns path and character."""

    output: Path
    """Folder of the new data set; it must not exist yet."""

    metadata_key: str
    """Name of the field that will hold the character in each sample's JSON and in the manifests."""

    resolution: str = "480p"
    """HEIGHTxWIDTH for all pictures, or 480p or 720p: the model's size of that area for their median aspect ratio."""

    fit: Literal["crop", "pad"] = "crop"
    """How pictures of another shape are fitted: crop cuts the overhang off, pad adds white borders."""

    val_split: float = 0.1
    """Share of the pictures, or of the characters, that is held out for validation."""

    val_by: Literal["sample", "identity"] = "sample"
    """sample: some pictures of every character validate; identity: all pictures of some characters do."""

    duplicate_distance: int = 2
    """Pictures of a character count as one if their perceptual hashes differ in at most so many of 64 bits; -1 keeps
    all."""

    samples_per_shard: int = 1000
    """Pictures in one tar file."""

    image_format: Literal["jpg", "png", "webp"] = "jpg"
    """How pictures are stored; png is lossless and several times larger."""

    quality: int = 95
    """Quality of jpg and webp."""

    max_bad_samples: int = 16
    """Unreadable pictures that are named and left out before packing stops."""

    max_megapixels: float = MAX_MEGAPIXELS
    """Larger pictures count as unreadable; a small file can unpack to a huge picture."""

    num_workers: int = 4
    """Pictures that are converted at the same time."""

    seed: int = 42
    """Decides the order of samples and which of them validate."""

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: with the flag to change.
        """
        if self.metadata_key in (IDENTITY_KEY, COUNT_KEY) or not self.metadata_key.isidentifier():
            raise UserError(f"--metadata_key {self.metadata_key!r} cannot be used: take a word such as 'species'.")
        if not 0.0 <= self.val_split < 1.0:
            raise UserError(f"--val_split {self.val_split} leaves nothing to train on: use 0 to 0.9.")
        if not -1 <= self.duplicate_distance <= 32:
            raise UserError(f"--duplicate_distance {self.duplicate_distance} is out of range: use -1 to 32.")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality} is out of range: use 1 to 100.")
        for name in ("samples_per_shard", "num_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be 1 or more.")
        if self.resolution not in BUCKETS:
            parse_size(self.resolution)


@dataclass(frozen=True)
class _Prepared:
    source: Source
    key: str
    hash: int
    pixels: int
    lost: float
    scale: float


def run(config: PackConfig) -> PackSummary:
    """Packs a data set. It appears under its name when it is complete, or not at all.

    Raises:
        UserError: nothing to pack, too many unreadable pictures, an output that exists or has no place, or a full disk.
    """
    output = config.output.absolute()
    require_writable(output.parent, "--output")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already: remove it, or choose another --output.")
    sources = read_sources(config.images, config.metadata_key)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as work:
            summary = _pack(config, sources, Path(work), Path(work) / "finished")
            os.rename(Path(work) / "finished", output)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"The disk that holds {output.parent} is full: free some space and pack again.") from error
    for line in [f"Packed {output}", *summary.lines()]:
        tqdm.write(line)
    return summary


def _pack(config: PackConfig, sources: list[Source], work: Path, finished: Path) -> PackSummary:
    faults = FaultCounter(config.max_bad_samples, "correct or remove them, or raise the limit")
    if config.resolution in BUCKETS:
        sizes = _each(
            config, sources, lambda source: upright_size(_read(source), config.max_megapixels), faults, "sizes"
        )
        size = bucket_size(config.resolution, [found for _, found in sizes])
        sources = [source for source, _ in sizes]
    else:
        size = parse_size(config.resolution)
    spool = work / "pictures"
    spool.mkdir()
    prepared = _each(config, sources, lambda source: _prepare(config, source, size, spool), faults, "pictures")
    groups, twins = _select([row for _, row in prepared], config.duplicate_distance)
    numbers = {character: number for number, character in enumerate(sorted(groups))}
    characters = {key: character for character, keys in groups.items() for key in keys}
    validation = validation_keys(groups, config.val_split, config.val_by, config.seed)
    counts = {}
    for split in SPLITS:
        keys = sorted(key for key in characters if (key in validation) == (split == "val"))
        keyed_random(config.seed, "order", split).shuffle(keys)
        samples = [
            (key, {config.metadata_key: characters[key], IDENTITY_KEY: numbers[characters[key]]}) for key in keys
        ]
        write_shards(finished, split, samples, spool, config.image_format, config.samples_per_shard)
        counts[split] = {
            name: sum(characters[key] == name for key in keys) for name in sorted({characters[key] for key in keys})
        }
        write_manifest(manifest_path(finished, split), config.metadata_key, counts[split], numbers)
    packed = {str(row.source.path): row for _, row in prepared if row.key in characters}
    return PackSummary(
        size,
        counts,
        twins,
        dict(faults.faults),
        {file: row.lost for file, row in packed.items()},
        {file: row.scale for file, row in packed.items()},
    )


def _each(
    config: PackConfig, sources: Sequence[Source], work: Callable[[Source], T], faults: FaultCounter, unit: str
) -> list[tuple[Source, T]]:
    """Runs `work` on every source in threads, in order; unreadable pictures are counted and left out."""
    done = []
    pool = ThreadPoolExecutor(config.num_workers)
    try:
        futures = [pool.submit(work, source) for source in sources]
        for source, future in zip(sources, tqdm(futures, desc=f"reading {unit}", unit="picture"), strict=True):
            try:
                done.append((source, future.result()))
            except BadImageError as error:
                faults.add({str(source.path): str(error)})
    finally:
        pool.shutdown(cancel_futures=True)
    if not done:
        raise UserError(f"No picture in {config.images} can be read: check that they are JPEG, PNG or WebP files.")
    return done


def _read(source: Source) -> bytes:
    try:
        return source.path.read_bytes()
    except OSError as error:
        raise BadImageError(f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise BadImageError(f"cannot be opened: {error}") from error


def _prepare(config: PackConfig, source: Source, size: tuple[int, int], spool: Path) -> _Prepared:
    data = _read(source)
    original = decode(data, config.max_megapixels)
    image = fit(original, size, config.fit)
    key = sample_key(source.character, data)
    (spool / key).write_bytes(encode(image, config.image_format, config.quality))
    scales = size[0] / original.height, size[1] / original.width
    cropping = config.fit == "crop"
    return _Prepared(
        source,
        key,
        perceptual_hash(image),
        original.width * original.height,
        lost=1 - min(scales) / max(scales) if cropping else 0.0,
        scale=max(scales) if cropping else min(scales),
    )


def sample_key(character: str, data: bytes) -> str:
    """Returns a name for a sample that a person can read and that changes only with the picture."""
    ascii_name = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "_", ascii_name).strip("_")[:_SLUG_LENGTH] or "character"
    digest = hashlib.blake2b(character.encode() + b"\0" + data, digest_size=8)
    return f"{slug}-{digest.hexdigest()}"


def _select(prepared: list[_Prepared], distance: int) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Groups keys by character without near-duplicates; of several alike the largest original stays.

    Returns:
        The groups, and each file that was left out with the file that it looks like.
    """
    by_character: dict[str, dict[str, _Prepared]] = {}
    twins = []
    for row in prepared:
        first = by_character.setdefault(row.source.character, {}).setdefault(row.key, row)
        if first is not row:
            twins.append((str(row.source.path), str(first.source.path)))
    groups = {}
    for character, rows in by_character.items():
        best_first = sorted(rows.values(), key=lambda row: (-row.pixels, row.source.path))
        alike = near_duplicates(((row.key, row.hash) for row in best_first), distance)
        groups[character] = [row.key for row in best_first if row.key not in alike]
        twins += [(str(rows[key].source.path), str(rows[twin].source.path)) for key, twin in alike.items()]
    return groups, twins
