"""Reading tar shards that nobody vouches for, by place instead of by stream.

A shard is walked header by header and only the small JSON members are read, so a sample is a name, a label and a
place in a file. Sampling, shuffling and resuming work on those; the bytes of a picture are read when it is chosen.

Python's tarfile, and webdataset on top of it, take a damaged or missing header for the end of the shard and
silently drop what follows; `scan_shard` looks at the end of the archive and refuses.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from webdataset.tariterators import group_by_keys

from vflora.data.images import SUFFIXES
from vflora.errors import UserError

_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_MAX_JSON_BYTES = 1 << 20
_MAX_IMAGE_BYTES = 256 << 20
_CACHED_SHARDS = 128


class BadShardError(Exception):
    """An archive that cannot be read to its end."""


class BadSampleError(Exception):
    """A sample that lacks its picture or usable metadata."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Where one picture lies, and what it shows.

    Attributes:
        key: name of the sample in its shard.
        label: canonical character name, or an identity id, whatever the index was asked for.
        shard: path of the tar file.
        offset: first byte of the picture in it.
        size: bytes of the picture.
    """

    key: str
    label: Any
    shard: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        """Shard and key, as error messages show them."""
        return f"{Path(self.shard).name}: {self.key}"

    def read(self) -> bytes:
        """Returns the undecoded picture."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one sample: the place of its picture, and its JSON as bytes.

    Attributes:
        key: name of the sample in its shard.
        images: suffix -> (offset, size) of every picture; a good sample has exactly one.
        metadata: the JSON member; None if there is none.
    """

    key: str
    images: dict[str, tuple[int, int]]
    metadata: bytes | None

    def image(self) -> tuple[int, int]:
        """Returns offset and size of the one picture.

        Raises:
            BadSampleError: there is none, there are several, or it is far too large.
        """
        if len(self.images) != 1:
            found = ", ".join(sorted(self.images)) or "none"
            raise BadSampleError(f"needs exactly one picture ({', '.join(SUFFIXES)}) and has {found}")
        offset, size = next(iter(self.images.values()))
        if size > _MAX_IMAGE_BYTES:
            raise BadSampleError(f"its picture takes {size >> 20} MiB, the limit is {_MAX_IMAGE_BYTES >> 20}")
        return offset, size

    def fields(self) -> dict[str, Any]:
        """Returns the parsed JSON object.

        Raises:
            BadSampleError: missing, not JSON, or not an object.
        """
        if self.metadata is None:
            raise BadSampleError("has no JSON beside its picture")
        try:
            fields = json.loads(self.metadata)
        except (ValueError, RecursionError) as error:
            raise BadSampleError("its JSON cannot be parsed") from error
        if not isinstance(fields, dict):
            raise BadSampleError("its JSON is not an object")
        return fields


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """Yields a shard's regular members the way webdataset's `group_by_keys` takes them, with places as data."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # keeps memory flat
            suffix = info.name.rpartition(".")[2].lower()
            if not info.isreg() or (suffix != "json" and suffix not in SUFFIXES):
                continue
            place: object = (info.offset_data, info.size)
            if suffix == "json":
                if info.size > _MAX_JSON_BYTES:
                    raise BadShardError(f"{info.name} takes {info.size} bytes, which is no sample's metadata")
                file.seek(info.offset_data)
                place = file.read(info.size)
            yield {"fname": info.name, "data": place, "__url__": str(path)}
        file.seek(tar.offset)
        end = file.read(len(_END_OF_ARCHIVE))
    if len(end) < len(_END_OF_ARCHIVE):
        raise BadShardError("the archive is cut off")
    if end != _END_OF_ARCHIVE:
        raise BadShardError("the archive is damaged in the middle")


def scan_shard(path: Path) -> Iterator[RawSample]:
    """Yields every sample of a shard, reading headers and JSON only.

    Raises:
        BadShardError: cut off, damaged, not a tar file, or two members of the same name.
    """
    started = False
    try:
        for group in group_by_keys(_members(path)):
            started = True
            metadata = group.get("json")
            yield RawSample(group["__key__"], {k: v for k, v in group.items() if k in SUFFIXES}, metadata)
    except tarfile.TarError as error:
        what = "the archive is cut off or damaged" if started else "not a readable tar file"
        raise BadShardError(f"{what} ({error})") from error
    except ValueError as error:
        raise BadShardError(f"two members of the same name ({error})") from error


def check_ending(path: Path) -> None:
    """Refuses a cut-off shard at the price of one small read.

    Raises:
        UserError: the file does not end like a tar archive.
    """
    if not ends_whole(path):
        raise UserError(f"The shard {path} is cut off: copy it again, or pack the data set again.")


def ends_whole(path: Path) -> bool:
    """Returns whether a file ends like a tar archive, at the price of one small read."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_END_OF_ARCHIVE)))
        return size % tarfile.BLOCKSIZE == 0 and file.read() == _END_OF_ARCHIVE


LabelOf = Callable[[Mapping[str, Any]], Any]


def labelled_samples(path: Path, label_of: LabelOf) -> Iterator[Sample]:
    """Yields the samples of a shard with their labels.

    Args:
        path: the tar file.
        label_of: picks the label out of a sample's JSON and raises BadSampleError if it cannot.

    Raises:
        UserError: the archive or the metadata of one of its samples is not usable, with the name.
    """
    key = ""
    try:
        for raw in scan_shard(path):
            key = raw.key
            yield Sample(key, label_of(raw.fields()), str(path), *raw.image())
    except BadShardError as error:
        place = f"after sample {key!r}" if key else "at all"
        raise UserError(
            f"The shard {path} cannot be read {place} ({error}): copy it again, or pack the data set again."
        ) from error
    except BadSampleError as error:
        raise UserError(
            f"Sample {key!r} of {path} {error}; `vflora data check` lists all such samples, packing again cures them."
        ) from error


def index_shard(path: Path, label_of: LabelOf) -> tuple[Sample, ...]:
    """Lists the samples of a shard in their order; a shard that was listed lately is not read again.

    Args:
        path: the tar file.
        label_of: as for `labelled_samples`; hashable, and equal to its copies.

    Raises:
        UserError: the archive or the metadata of one of its samples is not usable, with the name.
    """
    status = os.stat(path)
    return _index(str(path), status.st_mtime_ns, status.st_size, label_of)


@lru_cache(maxsize=_CACHED_SHARDS)
def _index(path: str, _modified: int, _size: int, label_of: LabelOf) -> tuple[Sample, ...]:
    return tuple(labelled_samples(Path(path), label_of))
