from collections import Counter

import pytest
import torch

from vflora.data.config import DataConfig
from vflora.data.schema import DataSet
from vflora.data.validation import ValidationLoader
from vflora.errors import UserError


@pytest.fixture
def config(wds_root) -> DataConfig:
    return DataConfig(wds_root=wds_root, metadata_key="species", batch_size=2, max_bad_samples=1)


@pytest.fixture
def dataset(wds_root) -> DataSet:
    return DataSet.open(wds_root, "species", "val")


def keys(loader) -> list[str]:
    return [key for batch in loader for key in batch.keys]


def test_the_same_samples_in_the_same_order_every_time(dataset, config):
    loader = ValidationLoader(dataset, config, seed=0)
    first = keys(loader)
    assert first == keys(loader) == keys(ValidationLoader(dataset, config, seed=0))
    assert len(loader) == -(-len(first) // 2)


def test_no_sample_comes_twice_and_all_processes_together_see_all(dataset, config):
    whole = keys(ValidationLoader(dataset, config, seed=0))
    assert len(set(whole)) == len(whole)
    for world_size in (2, 3):
        loaders = [ValidationLoader(dataset, config, seed=0, rank=r, world_size=world_size) for r in range(world_size)]
        parts = [keys(loader) for loader in loaders]
        assert Counter(key for part in parts for key in part) == Counter(whole)
        assert max(map(len, loaders)) == loaders[0].longest
        slots = {k: s for loader in loaders for b in loader for k, s in zip(b.keys, b.slots, strict=True)}
        assert slots == {key: slot for slot, key in enumerate(whole)}


def test_acceptance_thins_the_frequent_ones_out(kit, tmp_path, config):
    kit.write_data_set(tmp_path / "many", {"ada": 20, "bob": 80}, split="val")
    dataset = DataSet.open(tmp_path / "many", "species", "val")
    seen = Counter(name for batch in ValidationLoader(dataset, config, seed=0) for name in batch.characters)
    assert seen["ada"] == 20
    assert 8 < seen["bob"] < 34


def test_no_secondaries(dataset, config):
    for batch in ValidationLoader(dataset, config, seed=0):
        assert not batch.has_secondary.any()
        assert torch.equal(batch.images, batch.anchors)


def test_the_number_of_samples_can_be_limited(dataset, config):
    assert len(keys(ValidationLoader(dataset, config, seed=0, limit=3))) == 3


def test_damaged_pictures_are_skipped_up_to_the_limit(kit, wds_root, dataset, config):
    shard = dataset.shards[0]
    members = []
    for i, sample in enumerate(dataset.samples(shard)):
        members += kit.sample_members(sample.key, sample.label, 0, b"broken" if i < 2 else sample.read())
    kit.write_tar(shard, members)
    everything = ValidationLoader(dataset, config, seed=0)
    with pytest.raises(UserError, match="2 samples cannot be used"):
        keys(everything)
