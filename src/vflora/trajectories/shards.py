"""Trajectories as WebDataset shards: a safetensors member and a JSON member for each sample of a rollout.

shards/rollouts-00000000-00000063.tar        rollouts 0 to 63, as `plan` counts them
    0000000012-0003.json                      batch 12, slot 3: prompt, points, digest
    0000000012-0003.safetensors               latents and velocities [P, C, T, H, W]
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from webdataset.writer import TarWriter

from vflora.atomic import publish
from vflora.data.shards import ends_whole
from vflora.errors import UserError

_NAME = re.compile(r"rollouts-(\d+)-(\d+)\.tar")
_MAX_JSON_BYTES = 1 << 20
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Note:
    """What is written beside the tensors of a sample.

    Attributes:
        number: of the batch, counted over the run.
        slot: of the sample in the global batch.
        key: of the picture in its data set.
        prompt: that the teacher was given.
        conditions: digests of the prompt's and the picture's conditions, as the condition cache names them.
        points: steps of the schedule of the points kept, rising.
        digest: of the safetensors member.
    """

    number: int
    slot: int
    key: str
    prompt: str
    conditions: tuple[str, str]
    points: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class StoredSample:
    """A note, and where its tensors lie.

    Attributes:
        note: read already.
        shard: the tar file.
        offset: first byte of the tensors in it.
        size: bytes of the tensors.
    """

    note: Note
    shard: Path
    offset: int
    size: int

    def tensors(self) -> dict[str, Tensor]:
        """Returns latents and velocities [P, C, T, H, W] as they were kept.

        Raises:
            UserError: if a bit of them has changed.
        """
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if _digest(content) != self.note.digest:
            raise _damaged(self.shard)
        return load(content)


class ShardFile:
    """A shard that is being written; it appears under its name when it is finished, whole or not at all."""

    def __init__(self, folder: Path, first: int, rank: int):
        """Opens it.

        Args:
            folder: of the shards.
            first: number of the first rollout that goes in.
            rank: of this process, whose unfinished shard bears its number.
        """
        self._folder, self._first, self._rollouts = folder, first, 0
        self._unfinished = folder / f".unfinished-{rank}.tmp"
        self._file = open(self._unfinished, "wb")  # noqa: SIM115
        self._writer = TarWriter(self._file, mtime=0)  # a clock would make the bytes differ every time

    def add(self, samples: list[tuple[Note, bytes]]) -> None:
        """Writes the samples of one rollout."""
        for note, content in samples:
            key = f"{note.number:010d}-{note.slot:04d}"
            self._writer.write({"__key__": key, "json": asdict(note), "safetensors": content})
        self._rollouts += 1

    def finish(self) -> Path | None:
        """Gives the shard its name; one without a rollout leaves nothing behind."""
        self._writer.close()
        self._file.close()
        if not self._rollouts:
            self._unfinished.unlink()
            return None
        final = self._folder / f"rollouts-{self._first:08d}-{self._first + self._rollouts - 1:08d}.tar"
        publish(self._unfinished, final)
        return final

    def discard(self) -> None:
        """Leaves nothing behind; of a finished shard there is nothing to leave."""
        for part in (self._writer, self._file):
            with suppress(OSError):  # what a full disk did not take is not wanted
                part.close()
        self._unfinished.unlink(missing_ok=True)


def clear_unfinished(folder: Path, processes: int) -> None:
    """Removes what a killed process of an earlier, larger launch left; those of this launch overwrite their own."""
    for path in folder.glob(".unfinished-*.tmp"):
        if int(path.stem.rpartition("-")[2]) >= processes:
            path.unlink(missing_ok=True)


def packed(latents: Tensor, velocities: Tensor, dtype: torch.dtype) -> tuple[bytes, str]:
    """Returns the bytes of a sample's tensors [P, C, T, H, W], and their digest."""
    tensors = {"latents": latents, "velocities": velocities}
    content = save({name: value.to("cpu", dtype).contiguous() for name, value in tensors.items()})
    return content, _digest(content)


def find_shards(folder: Path) -> dict[Path, range]:
    """Returns the finished shards of a folder and the rollouts that each holds."""
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.glob("*.tar"))}
    return {path: range(int(match[1]), int(match[2]) + 1) for path, match in found.items() if match}


def require_whole(shard: Path) -> None:
    """Refuses a shard that was cut off on its way here.

    Raises:
        UserError: with what to do.
    """
    if not ends_whole(shard):
        raise _damaged(shard)


def read_shard(shard: Path) -> dict[tuple[int, int], StoredSample]:
    """Returns the samples of a shard by batch number and slot, without their tensors.

    Raises:
        UserError: if it is damaged.
    """
    places: dict[str, tuple[int, int]] = {}
    notes: dict[str, Note] = {}
    try:
        for key, suffix, place, content in _members(shard):
            if suffix == "json":
                notes[key] = _note(json.loads(content))
            else:
                places[key] = place
    except (tarfile.TarError, ValueError, TypeError, KeyError, EOFError) as error:
        raise _damaged(shard) from error
    if notes.keys() != places.keys():
        raise _damaged(shard)
    return {(note.number, note.slot): StoredSample(note, shard, *places[key]) for key, note in notes.items()}


def _members(shard: Path) -> Iterator[tuple[str, str, tuple[int, int], bytes]]:
    with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for info in tar:
            key, _, suffix = info.name.rpartition(".")
            if not info.isreg() or suffix not in ("json", "safetensors"):
                continue
            content = b""
            if suffix == "json":
                if info.size > _MAX_JSON_BYTES:
                    raise ValueError(f"{info.name} is no note")
                file.seek(info.offset_data)
                content = file.read(info.size)
            yield key, suffix, (info.offset_data, info.size), content


def _note(fields: dict[str, Any]) -> Note:
    text, picture = fields["conditions"]
    return Note(**fields | {"conditions": (text, picture), "points": tuple(fields["points"])})


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()


def _damaged(shard: Path) -> UserError:
    folder = shard.parent.parent
    return UserError(
        f"The shard {shard} is damaged: copy it again, or remove it and make it anew with "
        f"`vflora rollouts --config {folder / 'config.yaml'} --trajectory_dir {folder}`."
    )
