"""Batches of P identities x K pictures for the identity head.

The index holds the places of all pictures of a split, by identity; bytes are read when a batch asks for them. A
batch is a pure function of its number, so to resume at batch n is to start at n.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from vflora.data.decoding import FaultCounter, Faults, first_readable
from vflora.data.images import to_tensor
from vflora.data.sampling import IdentityBatches
from vflora.data.schema import common_size, find_shards, fingerprint, read_manifest
from vflora.data.shards import BadSampleError, Sample, labelled_samples
from vflora.data.workers import start_workers
from vflora.distributed.launch import is_first
from vflora.errors import UserError

logger = logging.getLogger(__name__)

_QUIET_SECONDS = 2.0


@dataclass(frozen=True)
class IdentityLabel:
    """Reads the identity's number out of a sample's JSON.

    Attributes:
        id_key: the field that holds it.
        known: the numbers that the manifest lists.
    """

    id_key: str
    known: frozenset[int]

    def __call__(self, fields: Mapping[str, Any]) -> int:
        """Returns the number.

        Raises:
            BadSampleError: the field is missing, not a whole number, or not in the manifest.
        """
        value = fields.get(self.id_key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadSampleError(f"has no whole number for {self.id_key!r} in its JSON (see --id_key)")
        if value not in self.known:
            raise BadSampleError(f"shows identity {value}, which the manifest does not list")
        return value


@dataclass(frozen=True)
class IdentityIndex:
    """Every picture of a split, by identity.

    Attributes:
        pools: identity -> its samples, in shard order.
        size: height and width of every picture.
        fingerprint: changes when the manifest or the shards change; a resumed run compares it.
    """

    pools: Mapping[int, tuple[Sample, ...]]
    size: tuple[int, int]
    fingerprint: str

    @classmethod
    def open(
        cls,
        wds_root: Path | str,
        id_key: str = "identity_id",
        *,
        split: str = "train",
        shards: str = "*.tar",
        manifest: str | None = None,
    ) -> IdentityIndex:
        """Lists a split's samples; pictures are not read, except one per shard for its size.

        Args:
            wds_root: the data set's folder.
            id_key: field of the JSON and column of the manifest with the identity's number.
            split: train or val.
            shards: pattern of file names under data/<split>.
            manifest: CSV file relative to `wds_root`; by default that of the split.

        Raises:
            UserError: whatever is wrong with shards, manifest or metadata, in a sentence that holds the fix.
        """
        root = Path(wds_root)
        paths = find_shards(root, split, shards)
        table = root / (manifest or f"manifest/{split}_manifest.csv")
        label_of = IdentityLabel(id_key, frozenset(_identities(table, id_key)))
        size = common_size(paths, label_of)
        pools: dict[int, list[Sample]] = {}
        for path in tqdm(
            paths,
            desc=f"listing {split} shards",
            unit="shard",
            delay=_QUIET_SECONDS,
            leave=False,
            disable=not is_first(),
        ):
            for sample in labelled_samples(path, label_of):
                pools.setdefault(sample.label, []).append(sample)
        frozen = {identity: tuple(pools[identity]) for identity in sorted(pools)}
        return cls(frozen, size, fingerprint(paths, table, id_key))

    def with_at_least(self, instances: int) -> Mapping[int, tuple[Sample, ...]]:
        """Returns the pools with `instances` samples or more, and says in the log how many are left out."""
        pools = {identity: pool for identity, pool in self.pools.items() if len(pool) >= instances}
        if len(pools) < len(self.pools):
            logger.warning(
                "%d of %d identities have fewer than %d pictures and are left out.",
                len(self.pools) - len(pools),
                len(self.pools),
                instances,
            )
        return pools


def _identities(table: Path, id_key: str) -> Iterator[int]:
    for line, row in enumerate(read_manifest(table, id_key), start=2):
        text = (row[id_key] or "").strip()
        if not text.isascii() or not text.removeprefix("-").isdigit():
            raise UserError(
                f"Line {line} of {table} has {text!r} for {id_key!r}, which is no whole number: "
                "name the column of identity numbers with --id_key (identity_id, as `vflora data pack` writes it)."
            )
        yield int(text)


HeadDelivery = tuple[Tensor | None, Tensor | None, Faults, str | None]


class HeadBatches(Dataset[HeadDelivery]):
    """What runs in a DataLoader worker: batch number -> pixels and identities."""

    def __init__(self, plan: IdentityBatches, size: tuple[int, int]) -> None:
        self._plan = plan
        self._size = size

    def __getitem__(self, number: int) -> HeadDelivery:
        faults: Faults = {}
        try:
            images, identities = [], []
            taken = self._plan.batch(number)
            for sample in tuple(taken):
                # A damaged picture is replaced by one that the batch does not have yet, or else by one it has.
                pool = self._plan.pools[sample.label]
                spare = [other for other in pool if other not in taken]
                found = first_readable(itertools.chain([sample], spare, pool), self._size, faults)
                if found is None:
                    raise UserError(
                        f"{sample.name} is damaged and identity {sample.label} has no other readable picture: "
                        "see `vflora data check`, and pack the data set again."
                    )
                taken.append(found[0])
                images.append(to_tensor(found[1]))
                identities.append(sample.label)
            return torch.stack(images), torch.tensor(identities), faults, None
        except UserError as error:
            return None, None, faults, str(error)


class HeadLoader:
    """Endless batches of P*K pictures, identity by identity, the same for any number of workers.

    Args:
        index: the split.
        identities: P, per process; processes get different identities.
        instances: K, different pictures of each identity.
        max_per_identity: pictures of one identity that take part before a new selection of them is drawn.
        num_workers: processes that decode; 0 decodes in this one.
        seed: decides everything together with the batch number.
        rank: this process.
        world_size: all processes.
        start_batch: batches already used by the run that is resumed.
        max_bad_samples: damaged pictures that are skipped before the run stops.

    Attributes:
        position: batches handed out, `start_batch` included; all the state there is.

    Raises:
        UserError: the split has one identity, or too few with K pictures.
    """

    def __init__(
        self,
        index: IdentityIndex,
        *,
        identities: int,
        instances: int,
        max_per_identity: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        max_bad_samples: int = 16,
    ) -> None:
        if len(index.pools) < 2:
            raise UserError(
                "The training split shows one character only, and a head learns to tell characters apart: pack "
                "pictures of others of its kind into a set for the head, and train the LoRA on this one."
            )
        pools = index.with_at_least(instances)
        plan = IdentityBatches(pools, identities, instances, max_per_identity, seed, rank, world_size)
        self._batches = HeadBatches(plan, index.size)
        self._num_workers = num_workers
        self._seed = seed
        self._faults = FaultCounter(max_bad_samples)
        self._deliveries: Iterator[HeadDelivery] | None = None
        self.position = start_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Returns images uint8 [P*K, 3, H, W] and their identities int64 [P*K].

        Raises:
            UserError: pictures of two sizes, or too many damaged ones.
        """
        if self._deliveries is None:
            order = itertools.count(self.position)
            self._deliveries = start_workers(self._batches, self._num_workers, self._seed, order)
        images, identities, faults, stop = next(self._deliveries)
        self._faults.add(faults)
        if images is None or identities is None:
            raise UserError(stop or "")
        self.position += 1
        return images, identities

    def close(self) -> None:
        """Ends the workers."""
        self._deliveries = None
