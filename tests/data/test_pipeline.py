import multiprocessing
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from webdataset import utils as wds_utils

from vflora.data.config import DataConfig
from vflora.data.pipeline import TrainLoader, slot_stream
from vflora.data.schema import DataSet
from vflora.errors import UserError
from vflora.types import Batch


@pytest.fixture
def config(wds_root: Path) -> DataConfig:
    return DataConfig(
        wds_root=wds_root,
        metadata_key="species",
        wds_shuffle_buf=8,
        batch_size=2,
        num_workers=0,
        p_secondary=0.5,
        enable_augmentation=True,
    )


def load(config: DataConfig, count: int, *, seed: int = 1, rank: int = 0, start_batch: int = 0) -> list[Batch]:
    dataset = DataSet.open(config.wds_root, config.metadata_key, "train")
    loader = TrainLoader(dataset, config, seed=seed, rank=rank, start_batch=start_batch)
    try:
        batches = list(islice(loader, count))
        assert loader.position == start_batch + count
    finally:
        loader.close()
    return batches


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images)
        and torch.equal(a.anchors, b.anchors)
        and torch.equal(a.has_secondary, b.has_secondary)
        and (a.characters, a.keys, a.slots) == (b.characters, b.keys, b.slots)
        for a, b in zip(ours, theirs, strict=True)
    )


def damage(kit, root: Path, keys: set[str], data: bytes = b"\x89PNG\r\n\x1a\n broken") -> None:
    """Rewrites the training shards with other bytes for some of the pictures."""
    identities = {"ada": 0, "bob": 1, "cleo": 2}
    for shard in sorted((root / "data" / "train").glob("*.tar")):
        members = []
        for sample in DataSet.open(root, "species", "train").samples(shard):
            picture = data if sample.key in keys else sample.read()
            members += kit.sample_members(sample.key, sample.label, identities[sample.label], picture)
        kit.write_tar(shard, members)


def test_batches_have_the_promised_form(kit, config):
    for batch in load(config, 8):
        assert batch.images.shape == batch.anchors.shape == (2, 3, *kit.SIZE)
        assert batch.images.dtype == batch.anchors.dtype == torch.uint8
        assert batch.has_secondary.dtype == torch.bool
        assert batch.slots == (0, 1)
        assert [key.split("-")[0] for key in batch.keys] == list(batch.characters)


def test_the_pictures_are_those_of_the_keys(kit, config):
    plain = replace(config, enable_augmentation=False)
    for batch in load(plain, 20):
        for image, key in zip(batch.images, batch.keys, strict=True):
            character, number = key.split("-")
            expected = kit.picture(1000 * ["ada", "bob", "cleo"].index(character) + int(number))
            assert image.permute(1, 2, 0).numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("damaged", [set(), {"ada-0", "cleo-1", "cleo-2", "cleo-3", "bob-5"}])
def test_the_anchor_is_another_picture_of_the_same_character_or_the_reference_itself(kit, config, damaged):
    damage(kit, config.wds_root, damaged)
    pictures = {
        kit.picture(1000 * identity + i).tobytes(): name
        for identity, name in enumerate(("ada", "bob", "cleo"))
        for i in range(12)
    }
    secondary = 0
    for batch in load(config, 60):
        for i in range(2):
            if batch.has_secondary[i]:
                secondary += 1
                assert pictures[batch.anchors[i].permute(1, 2, 0).numpy().tobytes()] == batch.characters[i]
            else:
                assert torch.equal(batch.anchors[i], batch.images[i])
    assert secondary > 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 7, 20])
def test_a_resumed_run_gets_exactly_what_the_other_would_have(config, workers, start):
    config = replace(config, num_workers=workers)
    assert same(load(config, 26)[start:], load(config, 26 - start, start_batch=start))


def test_the_number_of_workers_changes_nothing(config):
    expected = load(config, 12)
    for workers in (1, 2, 3):
        assert same(load(replace(config, num_workers=workers), 12), expected)


def test_a_run_may_be_resumed_with_other_workers(config):
    resumed = load(replace(config, num_workers=3), 6, start_batch=5)
    assert same(resumed, load(replace(config, num_workers=2), 11)[5:])


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 2), (4, 1)])
def test_the_number_of_processes_changes_nothing(config, world_size, batch_size):
    whole = load(replace(config, batch_size=4), 10)
    config = replace(config, batch_size=batch_size)
    for parts, batch in zip(
        zip(*(load(config, 10, rank=r) for r in range(world_size)), strict=True), whole, strict=True
    ):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.anchors for part in parts]), batch.anchors)
        assert sum((part.keys for part in parts), ()) == batch.keys
        assert sum((part.slots for part in parts), ()) == batch.slots == (0, 1, 2, 3)


def test_seeds_and_slots_have_streams_of_their_own(config):
    assert not same(load(config, 6), load(config, 6, seed=2))
    batches = load(config, 30)
    assert [b.keys[0] for b in batches] != [b.keys[1] for b in batches]


def test_characters_come_equally_often_and_no_picture_is_left_out(config):
    """Defect 1: with a threshold for a generator, "cleo" with most pictures would hardly be seen."""
    batches = load(replace(config, enable_augmentation=False, batch_size=8), 150)
    characters = Counter(name for batch in batches for name in batch.characters)
    assert set(characters) == {"ada", "bob", "cleo"}
    assert all(abs(count - 400) < 120 for count in characters.values())
    assert len({key for batch in batches for key in batch.keys}) == 20


def test_the_crop_differs_from_visit_to_visit(config):
    """Defect 1 also froze the crop."""
    views: dict[str, set[bytes]] = {}
    for batch in load(config, 40):
        for image, key in zip(batch.images, batch.keys, strict=True):
            views.setdefault(key, set()).add(image.numpy().tobytes())
    assert max(map(len, views.values())) > 3


def test_a_small_buffer_and_none_both_work(config):
    for buffer in (0, 1):
        assert len(load(replace(config, wds_shuffle_buf=buffer), 4)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_pictures_are_skipped_and_named(kit, config, workers, caplog):
    damage(kit, config.wds_root, {"ada-0", "cleo-3"})
    dataset = DataSet.open(config.wds_root, "species", "train")
    loader = TrainLoader(dataset, replace(config, num_workers=workers), seed=1)
    seen = {key for batch in islice(loader, 60) for key in batch.keys}
    assert set(loader.faults) == {"train-000000.tar: ada-0", "train-000001.tar: cleo-3"}
    assert {"ada-0", "cleo-3"}.isdisjoint(seen)
    assert sum("Skipped train-000000.tar: ada-0" in message for message in caplog.messages) == 1


def test_what_stands_in_for_a_damaged_picture_varies(kit, config):
    damage(kit, config.wds_root, {"ada-0"})
    config = replace(config, batch_size=1, p_secondary=0.0)
    dataset = DataSet.open(config.wds_root, "species", "train")
    draws = islice(slot_stream(dataset, config, 1, "slot", 0), 90)
    numbers = [number for number, draw in enumerate(draws) if draw.sample.key == "ada-0"]
    keys = [batch.keys[0] for batch in load(config, 90)]
    assert len(numbers) > 8
    assert len({keys[number] for number in numbers}) > 4


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_does_not_break_exact_resuming(kit, config, workers):
    """What stands in for a damaged picture must not move the stream, because resuming decodes nothing."""
    damage(kit, config.wds_root, {"ada-0", "bob-1", "bob-4", "cleo-3"})
    config = replace(config, num_workers=workers)
    assert same(load(config, 24)[11:], load(config, 13, start_batch=11))


def test_resuming_decodes_nothing_on_the_way(kit, config):
    damage(kit, config.wds_root, {"cleo-3"})
    config = replace(config, batch_size=1)
    dataset = DataSet.open(config.wds_root, "species", "train")
    from_start = TrainLoader(dataset, config, seed=1)
    list(islice(from_start, 200))
    assert list(from_start.faults) == ["train-000001.tar: cleo-3"]
    resumed = TrainLoader(dataset, config, seed=1, start_batch=200)
    assert len(next(resumed)) == 1
    assert resumed.faults == {}
    assert resumed.position == 201


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_damaged_pictures_stop_the_run_and_are_named(kit, config, workers):
    damage(kit, config.wds_root, {"ada-0", "ada-1", "bob-1", "cleo-3"})
    with pytest.raises(UserError, match="3 samples cannot be used, --max_bad_samples allows 2: .*ada-") as caught:
        load(replace(config, num_workers=workers, max_bad_samples=2, batch_size=1), 500)
    assert "\n" not in str(caught.value)


def test_an_oversized_picture_counts_as_damaged(kit, config):
    bomb = kit.encoded(kit.picture(1)).replace((48).to_bytes(4, "big"), (60_000).to_bytes(4, "big"), 1)
    bomb = bomb.replace((32).to_bytes(4, "big"), (60_000).to_bytes(4, "big"), 1)
    damage(kit, config.wds_root, {"bob-1"}, bomb)
    dataset = DataSet.open(config.wds_root, "species", "train")
    loader = TrainLoader(dataset, config, seed=1)
    list(islice(loader, 80))
    assert list(loader.faults) == ["train-000001.tar: bob-1"]


def test_nothing_but_damaged_pictures_stops_the_run(kit, config):
    dataset = DataSet.open(config.wds_root, "species", "train")
    damage(kit, config.wds_root, {key.key for shard in dataset.shards for key in dataset.samples(shard)})
    loader = TrainLoader(dataset, replace(config, max_bad_samples=50), seed=1)
    with pytest.raises(UserError, match="so were 1000 others"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_of_another_size_is_refused_by_name(kit, config, workers):
    """Defect 13: the size is the data set's, not that of whatever came first in a batch."""
    damage(kit, config.wds_root, {"bob-1"}, kit.encoded(kit.picture(1, (48, 32))))
    with pytest.raises(UserError, match=r"train-000001.tar: bob-1 is 48x32 and the data set's first picture 32x48"):
        load(replace(config, num_workers=workers), 500)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_damaged_in_the_middle_stops_the_run(config, workers):
    dataset = DataSet.open(config.wds_root, "species", "train")
    shard = dataset.shards[1]
    data = bytearray(shard.read_bytes())
    data[data.index(b"bob-3.json") + 150] ^= 0xFF
    shard.write_bytes(data)
    loader = TrainLoader(dataset, replace(config, num_workers=workers), seed=1)
    with pytest.raises(UserError, match=r"train-000001.tar cannot be read after sample .*damaged in the middle"):
        list(islice(loader, 200))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_the_workers_to_finish_the_step(config, stop):
    before = {*multiprocessing.active_children()}
    dataset = DataSet.open(config.wds_root, "species", "train")
    loader = TrainLoader(dataset, replace(config, num_workers=2), seed=1)
    next(loader)
    workers = {*multiprocessing.active_children()} - before
    assert len(workers) == 2
    for worker in workers:
        # Not from here, whom the workers obey: from a terminal, torchrun or Slurm.
        subprocess.run(["kill", f"-{stop.value}", str(worker.pid)], check=True)
    assert len(list(islice(loader, 30))) == 30
    loader.close()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()


def test_workers_of_a_loader_that_nobody_closed_end_with_the_process(config):
    script = (
        "import sys\n"
        "from vflora.data.config import DataConfig\n"
        "from vflora.data.pipeline import TrainLoader\n"
        "from vflora.data.schema import DataSet\n"
        "loader = TrainLoader(DataSet.open(sys.argv[1], 'species', 'train'), DataConfig(sys.argv[1], 'species',\n"
        "    num_workers=2), seed=1)\n"
        "next(loader)\n"
        "sys.modules['keep'] = loader\n"
    )
    subprocess.run([sys.executable, "-c", script, str(config.wds_root)], check=True, timeout=120)


def test_nothing_in_a_shard_can_run_code():
    assert wds_utils.enforce_security is True


def test_the_global_generator_is_left_alone(config):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load(replace(config, num_workers=1), 2)
    assert torch.equal(before, torch.get_rng_state())
