"""The validation split: the same samples in the same order every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import SimpleShardList

from vflora.data.config import DataConfig
from vflora.data.decoding import FaultCounter, Faults, decode_sample
from vflora.data.images import to_tensor
from vflora.data.sampling import Acceptance
from vflora.data.schema import DataSet
from vflora.types import Batch


class ValidationLoader:
    """The validation samples in shard order: thinned out by inverse frequency, the same ones every time.

    The i-th sample goes to process i % world_size, and its slot is i, so noise keyed by slot does not depend on the
    number of processes. No secondary references, no augmentation.

    Args:
        dataset: the validation split.
        config: batch size and how many damaged pictures are skipped before the run stops.
        seed: decides which samples are accepted.
        limit: samples over all processes; None takes all.
        rank: this process.
        world_size: all processes.
    """

    def __init__(
        self,
        dataset: DataSet,
        config: DataConfig,
        *,
        seed: int,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        acceptance = Acceptance(dataset.counts)
        stages = DataPipeline(
            SimpleShardList([str(shard) for shard in dataset.shards]),
            lambda shards: (sample for shard in shards for sample in dataset.samples(shard["url"])),
            lambda samples: (s for s in samples if acceptance.accepts_key(s.label, s.key, seed)),
        )
        chosen = list(enumerate(itertools.islice(stages, limit)))
        self._dataset = dataset
        self._mine = chosen[rank::world_size]
        self._batch_size = config.batch_size
        self._faults = FaultCounter(config.max_bad_samples)
        self.longest = -(-len(chosen[::world_size]) // config.batch_size)
        """Batches of the process that has most; the others must still join its collectives."""

    def __len__(self) -> int:
        return -(-len(self._mine) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; a damaged picture makes its batch smaller.

        Raises:
            UserError: pictures of two sizes, or too many damaged ones.
        """
        for start in range(0, len(self._mine), self._batch_size):
            faults: Faults = {}
            rows = [
                (slot, sample, to_tensor(image))
                for slot, sample in self._mine[start : start + self._batch_size]
                if (image := decode_sample(sample, self._dataset.size, faults)) is not None
            ]
            self._faults.add(faults)
            if rows:
                images = torch.stack([image for _, _, image in rows])
                yield Batch(
                    images=images,
                    anchors=images,
                    has_secondary=torch.zeros(len(rows), dtype=torch.bool),
                    characters=tuple(sample.label for _, sample, _ in rows),
                    keys=tuple(sample.key for _, sample, _ in rows),
                    slots=tuple(slot for slot, _, _ in rows),
                )
