"""The layout of a data set, and the checks that cost nothing.

    WDS_ROOT/data/train/train-000000.tar ...   WDS_ROOT/manifest/train_manifest.csv
    WDS_ROOT/data/val/val-000000.tar ...       WDS_ROOT/manifest/val_manifest.csv

A sample is KEY.jpg (or jpeg, png, webp) and KEY.json with `{metadata_key: character, "identity_id": number}`.
A manifest has the columns metadata_key, identity_id and count. Shards without identity_id are read as well.
"""

from __future__ import annotations

import csv
import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vflora.data.images import BadImageError, upright_size
from vflora.data.shards import BadSampleError, LabelOf, Sample, check_ending, index_shard, labelled_samples
from vflora.errors import UserError

IDENTITY_KEY = "identity_id"
COUNT_KEY = "count"
SPLITS = ("train", "val")


def canonical(name: str) -> str:
    """Returns the form of a character's name by which samples and manifests are matched: lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


def shard_folder(wds_root: Path, split: str) -> Path:
    """Returns the folder of a split's tar files."""
    return wds_root / "data" / split


def manifest_path(wds_root: Path, split: str) -> Path:
    """Returns the manifest of a split."""
    return wds_root / "manifest" / f"{split}_manifest.csv"


def find_shards(wds_root: Path, split: str, pattern: str = "*.tar") -> tuple[Path, ...]:
    """Lists a split's shards by name, each of them whole at its end.

    Raises:
        UserError: no such folder, no shards in it, or one of them cut off.
    """
    folder = shard_folder(wds_root, split)
    shards = tuple(sorted(folder.glob(pattern)))
    if not shards and split == "val" and folder.is_dir():
        raise UserError(
            f"{wds_root} holds no pictures for validation: pack it with a larger --val_split, or train without "
            "(no --enable_validation; --val_every 0 for the head)."
        )
    if not shards:
        raise UserError(f"There are no shards {folder / pattern}: pack a data set with `vflora data pack`.")
    for shard in shards:
        check_ending(shard)
    return shards


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Reads the columns and rows of a manifest.

    Raises:
        UserError: no such file, or not a CSV file in UTF-8.
    """
    if not path.is_file():
        raise UserError(f"There is no manifest {path}: pack the data set with `vflora data pack`.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The manifest {path} is not a CSV file in UTF-8 ({error}): save it as one.") from error
    return list(reader.fieldnames or []), rows


def read_manifest(path: Path, metadata_key: str) -> list[dict[str, str]]:
    """Reads the rows of a manifest.

    Raises:
        UserError: no such file, not a CSV file, or no column `metadata_key`.
    """
    columns, rows = read_table(path)
    if metadata_key not in columns:
        found = ", ".join(columns) or "none"
        raise UserError(
            f"The manifest {path} has no column {metadata_key!r}, its columns are {found}: "
            "name the right one with --metadata_key (--id_key for the head)."
        )
    return rows


def read_counts(path: Path, metadata_key: str) -> dict[str, int]:
    """Reads how many samples each character has.

    Raises:
        UserError: as `read_manifest`, or a count that is not a whole number, or no character at all.
    """
    counts: dict[str, int] = {}
    for line, row in enumerate(read_manifest(path, metadata_key), start=2):
        character, text = canonical(row[metadata_key] or ""), (row.get(COUNT_KEY) or "").strip()
        if not text.isascii() or not text.isdigit():
            raise UserError(f"Line {line} of {path} has {text!r} for {COUNT_KEY!r}: write the number of pictures.")
        if int(text) > 0:
            counts[character] = counts.get(character, 0) + int(text)
    if not counts:
        raise UserError(f"The manifest {path} lists no character: pack the data set with `vflora data pack`.")
    return counts


@dataclass(frozen=True)
class CharacterLabel:
    """Reads the canonical character name out of a sample's JSON.

    Attributes:
        metadata_key: the field that holds it.
        known: the characters that the manifest lists.
    """

    metadata_key: str
    known: frozenset[str]

    def __call__(self, fields: Mapping[str, Any]) -> str:
        """Returns the name.

        Raises:
            BadSampleError: the field is missing, not text, or not in the manifest.
        """
        if self.metadata_key not in fields:
            found = ", ".join(map(str, fields)) or "none"
            raise BadSampleError(f"has no field {self.metadata_key!r} in its JSON, only {found} (see --metadata_key)")
        value = fields[self.metadata_key]
        if not isinstance(value, str) or not canonical(value):
            raise BadSampleError(f"has {value!r} for {self.metadata_key!r} in its JSON, which names no character")
        if canonical(value) not in self.known:
            raise BadSampleError(f"shows {canonical(value)!r}, which the manifest does not list")
        return canonical(value)


@dataclass(frozen=True)
class DataSet:
    """One split of a data set.

    Attributes:
        root: the data set's folder.
        split: train or val.
        metadata_key: field that names the character.
        shards: its tar files, sorted by name.
        counts: samples per canonical character name, from the manifest.
        size: height and width of every picture, learned from the first sample of the first shard.
        fingerprint: changes when the manifest or the shards change; a resumed run compares it.
    """

    root: Path
    split: str
    metadata_key: str
    shards: tuple[Path, ...]
    counts: Mapping[str, int]
    size: tuple[int, int]
    fingerprint: str

    @classmethod
    def open(cls, wds_root: Path | str, metadata_key: str, split: str) -> DataSet:
        """Opens a split after looking at its manifest and at the first sample of each shard.

        Raises:
            UserError: whatever is wrong with them, in a sentence that holds the fix.
        """
        root = Path(wds_root)
        if not root.is_dir():
            raise UserError(f"There is no data set {root}: make one with `vflora data pack`, or correct --wds_root.")
        shards = find_shards(root, split)
        manifest = manifest_path(root, split)
        counts = read_counts(manifest, metadata_key)
        size = common_size(shards, CharacterLabel(metadata_key, frozenset(counts)))
        return cls(root, split, metadata_key, shards, counts, size, fingerprint(shards, manifest, metadata_key))

    @cached_property
    def label_of(self) -> CharacterLabel:
        """What reads the character out of this data set's JSON."""
        return CharacterLabel(self.metadata_key, frozenset(self.counts))

    def samples(self, shard: Path | str) -> tuple[Sample, ...]:
        """Lists the samples of one shard; labels are character names.

        Raises:
            UserError: the shard or a sample's metadata is damaged, or its character is not in the manifest.
        """
        return index_shard(Path(shard), self.label_of)


def common_size(shards: Iterable[Path], label_of: LabelOf) -> tuple[int, int]:
    """Learns height and width from the first readable picture, and compares the first one of every other shard.

    Raises:
        UserError: two sizes, unusable metadata, or nothing readable.
    """
    size = None
    for shard in shards:
        for sample in labelled_samples(shard, label_of):
            try:
                found = upright_size(sample.read())
            except BadImageError:
                continue
            size = size or found
            require_size(sample, found, size)
            break
    if size is None:
        raise UserError("The shards hold no readable picture: pack the data set again.")
    return size


def require_size(sample: Sample, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """Refuses a picture of another size than the data set's.

    Raises:
        UserError: with the sample's name and both sizes.
    """
    if found != expected:
        raise UserError(
            f"{sample.name} is {found[0]}x{found[1]} and the data set's first picture {expected[0]}x{expected[1]}: "
            "all pictures must have one size, `vflora data pack --resolution` makes it so."
        )


def fingerprint(shards: tuple[Path, ...], manifest: Path, metadata_key: str) -> str:
    """Returns a digest of the manifest, the key, and the names and sizes of the shards."""
    digest = hashlib.blake2b(manifest.read_bytes(), digest_size=16)
    digest.update(metadata_key.encode())
    for shard in shards:
        digest.update(f"\0{shard.name}\0{shard.stat().st_size}".encode())
    return digest.hexdigest()
