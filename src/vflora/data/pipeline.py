"""Shards -> Batch, endless, and the same whatever the number of processes, workers and restarts.

Each place ("slot") of the global batch has an endless stream of its own, keyed by seed and slot:

    resampled shards -> their samples -> shuffle buffer -> acceptance -> secondary reference     (places in files)
    -> read and decode                                                                           (only what is used)

Everything above the last line costs microseconds per sample, so every DataLoader worker walks the streams of its
process from the beginning, and decodes the batches that are its own. To resume at batch n is to walk n batches
without decoding. What is drawn for decoding itself (the crop, a stand-in for a damaged picture) is keyed by slot
and batch number, and so needs no walk.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm
from webdataset import utils as wds_utils
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import ResampledShards

from vflora.data.config import DataConfig
from vflora.data.decoding import FaultCounter, Faults, decode_sample, first_readable
from vflora.data.images import to_tensor
from vflora.data.sampling import Acceptance, Draw, accept, attach_secondary, crop_box, keyed_random
from vflora.data.schema import DataSet
from vflora.data.shards import Sample
from vflora.data.workers import start_workers
from vflora.errors import UserError
from vflora.random_streams import keyed_seed
from vflora.types import Batch

# Shards come from strangers: no member may be unpickled and no address run as a command.
wds_utils.enforce_security = True  # pyright: ignore[reportAttributeAccessIssue]

_STAND_IN_TRIES = 1000
_QUIET_SECONDS = 2.0

Delivery = tuple[Batch | None, Faults, str | None]
"""What a worker hands over: a batch, the damaged samples it met, and the sentence that ends the run."""


def slot_stream(dataset: DataSet, config: DataConfig, *key: int | str) -> Iterator[Draw]:
    """Yields the draws of one slot forever; equal keys give equal streams.

    Raises:
        UserError: while iterating, if a shard or a sample's metadata is damaged.
    """

    def expand(shards: Iterator[dict[str, Any]]) -> Iterator[Sample]:
        return (sample for shard in shards for sample in dataset.samples(shard["url"]))

    def accepted(samples: Iterator[Sample]) -> Iterator[Sample]:
        return accept(samples, Acceptance(dataset.counts), keyed_random(*key, "acceptance"))

    def paired(samples: Iterator[Sample]) -> Iterator[Draw]:
        generator = keyed_random(*key, "secondary")
        return attach_secondary(samples, config.p_secondary, config.secondary_cache_max_size, generator)

    shards = [str(shard) for shard in dataset.shards]
    buffer = config.wds_shuffle_buf
    stages = DataPipeline(
        ResampledShards(shards, seed=keyed_seed(*key, "shards"), worker_seed=lambda: 0, deterministic=True),
        expand,
        shuffle(buffer, initial=buffer, rng=keyed_random(*key, "shuffle")),
        accepted,
        paired,
    )
    return iter(stages)


Place = tuple[int, int]
"""Which batch: its number, and the data-parallel process that sees it."""


@dataclass(frozen=True)
class Onward:
    """All batches of one process from a number on.

    Attributes:
        rank: the process.
        start: number of the first batch.
    """

    rank: int
    start: int

    def __iter__(self) -> Iterator[Place]:
        return ((number, self.rank) for number in itertools.count(self.start))


class TrainBatches(IterableDataset[Delivery]):
    """What runs in a DataLoader worker: the streams that the wanted batches need, decoded for every W-th batch.

    Args:
        dataset: the training split.
        config: how it is drawn.
        seed: decides everything together with slot and batch number.
        places: the wanted batches; the numbers of a process rise. Process r serves slots r * batch_size and up.
    """

    def __init__(self, dataset: DataSet, config: DataConfig, *, seed: int, places: Iterable[Place]) -> None:
        self._dataset = dataset
        self._config = config
        self._seed = seed
        self._places = places

    def __iter__(self) -> Iterator[Delivery]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        faults: Faults = {}
        try:
            for turn, (number, slots, draws) in enumerate(self._draws(quiet=worker > 0)):
                if turn % workers == worker:
                    yield self._decode(number, slots, draws, faults), faults, None
                    faults = {}
        except UserError as error:
            # Passed on as a value: DataLoader would bury the sentence in a traceback.
            yield None, faults, str(error)

    def _draws(self, *, quiet: bool) -> Iterator[tuple[int, range, list[Draw]]]:
        size = self._config.batch_size
        streams: dict[int, list[Iterator[Draw]]] = {}
        walked: dict[int, int] = defaultdict(int)
        for number, rank in self._places:
            slots = range(rank * size, (rank + 1) * size)
            if rank not in streams:
                streams[rank] = [slot_stream(self._dataset, self._config, self._seed, "slot", slot) for slot in slots]
            self._walk(streams[rank], number - walked[rank], quiet=quiet or rank > 0)
            walked[rank] = number + 1
            yield number, slots, [next(stream) for stream in streams[rank]]

    def _walk(self, streams: list[Iterator[Draw]], batches: int, *, quiet: bool) -> None:
        """Passes by batches that nobody wants decoded."""
        if batches == 0:
            return
        passed = tqdm(
            range(batches),
            desc="finding the place in the data",
            unit="batch",
            delay=_QUIET_SECONDS,
            leave=False,
            disable=quiet,
        )
        for _ in passed:
            for stream in streams:
                next(stream)

    def _decode(self, number: int, slots: range, draws: list[Draw], faults: Faults) -> Batch:
        images, anchors, has_secondary, samples = [], [], [], []
        for slot, draw in zip(slots, draws, strict=True):
            sample, image = self._reference(number, slot, draw.sample, faults)
            # A stand-in may show someone else, whom the secondary would then contradict.
            secondary = draw.secondary if sample is draw.sample else None
            anchor = None if secondary is None else decode_sample(secondary, self._dataset.size, faults)
            if self._config.enable_augmentation:
                image = self._augment(number, slot, image)
            images.append(to_tensor(image))
            anchors.append(images[-1] if anchor is None else to_tensor(anchor))
            has_secondary.append(anchor is not None)
            samples.append(sample)
        return Batch(
            images=torch.stack(images),
            anchors=torch.stack(anchors),
            has_secondary=torch.tensor(has_secondary),
            characters=tuple(sample.label for sample in samples),
            keys=tuple(sample.key for sample in samples),
            slots=tuple(slots),
        )

    def _reference(self, number: int, slot: int, sample: Sample, faults: Faults) -> tuple[Sample, Image.Image]:
        image = decode_sample(sample, self._dataset.size, faults)
        if image is not None:
            return sample, image
        # From a stream of its own: a run that resumes behind this batch does not know that anything was damaged.
        stand_ins = slot_stream(self._dataset, self._config, self._seed, "stand-in", slot, number)
        tries = (draw.sample for draw in itertools.islice(stand_ins, _STAND_IN_TRIES))
        found = first_readable(tries, self._dataset.size, faults)
        if found is None:
            raise UserError(
                f"{sample.name} is damaged and so were {_STAND_IN_TRIES} others in its place: "
                "see `vflora data check`, and pack the data set again."
            )
        return found

    def _augment(self, number: int, slot: int, image: Image.Image) -> Image.Image:
        generator = keyed_random(self._seed, "crop", slot, number)
        box = crop_box(self._dataset.size, self._config.augment_r, self._config.augment_j, generator)
        return image.resize(image.size, Image.Resampling.LANCZOS, box=box)


class TrainLoader:
    """Training batches of one process, endless unless `places` names them.

    Equal seeds give equal batches for any number of workers; processes x batch_size may be split differently as
    long as their product stays the same.

    Args:
        dataset: the training split.
        config: batch size, workers and how samples are drawn.
        seed: of the run.
        rank: this data-parallel process.
        start_batch: batches already used by the run that is resumed, counted in micro-batches of one process.
        places: these batches, instead of all of `rank` from `start_batch` on; the loader ends behind them.

    Attributes:
        position: batches handed out, `start_batch` included; what a checkpoint must keep.
    """

    def __init__(
        self,
        dataset: DataSet,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        start_batch: int = 0,
        places: Sequence[Place] | None = None,
    ) -> None:
        wanted = Onward(rank, start_batch) if places is None else places
        self._batches = TrainBatches(dataset, config, seed=seed, places=wanted)
        self._num_workers = config.num_workers
        self._seed = seed
        self._faults = FaultCounter(config.max_bad_samples)
        self._deliveries: Iterator[Delivery] | None = None
        self.position = start_batch

    @property
    def faults(self) -> Faults:
        """Damaged samples met so far, by name."""
        return dict(self._faults.faults)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            UserError: pictures of two sizes, a damaged shard, or too many damaged pictures.
        """
        if self._deliveries is None:
            self._deliveries = start_workers(self._batches, self._num_workers, self._seed)
        batch, faults, stop = next(self._deliveries)
        self._faults.add(faults)
        if stop is not None or batch is None:
            raise UserError(stop or "")
        self.position += 1
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._deliveries = None
