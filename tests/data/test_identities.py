import json
import logging
from itertools import islice
from pathlib import Path

import pytest
import torch

from vflora.data.identities import HeadLoader, IdentityIndex
from vflora.errors import UserError


@pytest.fixture
def root(kit, tmp_path: Path) -> Path:
    return kit.write_data_set(tmp_path / "wds", {"ada": 2, "bob": 6, "cleo": 12, "dan": 5, "eve": 1})


@pytest.fixture
def index(root) -> IdentityIndex:
    return IdentityIndex.open(root)


def load(index: IdentityIndex, count: int, **settings) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = HeadLoader(index, **{"identities": 2, "instances": 2, "seed": 3, **settings})
    batches = list(islice(loader, count))
    loader.close()
    return batches


def same(ours, theirs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def picture_tensor(kit, identity: int, number: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(kit.picture(1000 * identity + number).tobytes()), dtype=torch.uint8)


def test_batches_hold_pictures_of_their_identities(kit, index):
    for images, identities in load(index, 20):
        assert images.shape == (4, 3, *kit.SIZE)
        assert images.dtype == torch.uint8
        assert identities.dtype == torch.int64
        assert identities[0] == identities[1] != identities[2] == identities[3]
        for image, identity in zip(images, identities.tolist(), strict=True):
            flat = image.permute(1, 2, 0).flatten()
            assert any(torch.equal(flat, picture_tensor(kit, identity, i)) for i in range(12))
        assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_starting_at_the_batch(index, workers):
    batches = load(index, 12, num_workers=workers)
    assert same(batches[5:], load(index, 7, num_workers=workers, start_batch=5))


def test_the_number_of_workers_changes_nothing(index):
    expected = load(index, 8)
    for workers in (1, 3):
        assert same(load(index, 8, num_workers=workers), expected)


def test_position_counts_batches(index):
    loader = HeadLoader(index, identities=2, instances=2, start_batch=4)
    next(loader)
    assert loader.position == 5


def test_identities_with_too_few_pictures_are_left_out_and_counted(index, caplog):
    with caplog.at_level(logging.WARNING):
        batches = load(index, 30, instances=4)
    assert {int(i) for _, identities in batches for i in identities} == {1, 2, 3}
    assert "2 of 5 identities have fewer than 4 pictures" in caplog.text


def test_too_few_identities_are_refused(index):
    with pytest.raises(UserError, match="--pk_identities 9 .* 4 identities with 2 or more pictures: use 2 to 4"):
        HeadLoader(index, identities=9, instances=2)


def test_a_damaged_picture_is_replaced_by_one_of_the_same_identity(kit, root, caplog):
    for shard in sorted((root / "data/train").glob("*.tar")):
        members = []
        for pool in IdentityIndex.open(root).pools.values():
            for sample in pool:
                if sample.shard == str(shard):
                    broken = sample.key in ("bob-1", "bob-2", "dan-0")
                    members += kit.sample_members(sample.key, "x", sample.label, b"torn" if broken else sample.read())
        kit.write_tar(shard, members)
    batches = load(IdentityIndex.open(root), 30)
    assert {name for name in ("bob-1", "bob-2", "dan-0") if name in caplog.text} == {"bob-1", "bob-2", "dan-0"}
    for images, identities in batches:
        assert sorted(identities.bincount().tolist())[-2:] == [2, 2]
        assert not torch.equal(images[0], images[1])
    assert same(batches[9:], load(IdentityIndex.open(root), 21, start_batch=9))
    with pytest.raises(UserError, match="--max_bad_samples allows 1"):
        load(IdentityIndex.open(root), 30, max_bad_samples=1)


def test_two_sizes_are_refused_by_name(kit, root):
    shard = root / "data/train/train-000001.tar"
    members = [m for s in IdentityIndex.open(root).pools[1] for m in kit.sample_members(s.key, "bob", 1, s.read())]
    odd = kit.sample_members("odd", "bob", 1, kit.encoded(kit.picture(1, (48, 32))))
    kit.write_tar(shard, [*members[:4], *odd])
    with pytest.raises(UserError, match="train-000001.tar: odd is 48x32"):
        load(IdentityIndex.open(root), 60, identities=2, num_workers=2)


def test_the_references_layout_and_flags(kit, tmp_path):
    """Only an integer under the key, own names for shards and manifest."""
    members = []
    for i in range(4):
        fields = json.dumps({"pokemon": i // 2}).encode()
        members += [(f"{i}.webp", kit.encoded(kit.picture(i), "WEBP")), (f"{i}.json", fields)]
    kit.write_tar(tmp_path / "data/train/set-a-0.tar", members)
    kit.write_tar(tmp_path / "data/train/other.tar", [("x.json", b"{}")])
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/ids.csv").write_text("pokemon\n0\n1\n")
    index = IdentityIndex.open(tmp_path, "pokemon", shards="set-*.tar", manifest="lists/ids.csv")
    assert {identity: len(pool) for identity, pool in index.pools.items()} == {0: 2, 1: 2}


def test_one_identity_is_refused_with_what_helps(kit, tmp_path):
    index = IdentityIndex.open(kit.write_data_set(tmp_path / "one", {"ada": 8}))
    with pytest.raises(UserError, match="one character only.*pack pictures of others") as refusal:
        load(index, 1, identities=2)
    assert "--pk_instances" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [("species", "'ada' for 'species', which is no whole number.*--id_key"), ("name", "no column 'name'")],
)
def test_a_column_without_numbers_is_refused(root, key, message):
    with pytest.raises(UserError, match=message):
        IdentityIndex.open(root, key)


@pytest.mark.parametrize(
    ("value", "message"), [('"0"', "no whole number"), ("77", "manifest does not list"), ("true", "no whole")]
)
def test_json_without_a_known_number_is_refused(kit, root, value, message):
    members = [("odd.png", kit.encoded(kit.picture(1))), ("odd.json", f'{{"identity_id": {value}}}'.encode())]
    kit.write_tar(root / "data/train/train-000001.tar", members)
    with pytest.raises(UserError, match=message):
        IdentityIndex.open(root)
