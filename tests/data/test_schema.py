import json
from pathlib import Path

import pytest

from vflora.data.schema import DataSet, canonical
from vflora.errors import UserError


def test_opens_a_data_set(kit, wds_root):
    data = DataSet.open(wds_root, "species", "train")
    assert data.size == kit.SIZE
    assert data.counts == {"ada": 2, "bob": 6, "cleo": 12}
    assert [shard.name for shard in data.shards] == ["train-000000.tar", "train-000001.tar"]
    assert len(data.samples(data.shards[0])) == 10


def test_shards_without_identity_numbers_are_read_too(kit, tmp_path):
    """The reference's own layout: the JSON holds the character only, the manifest no identity_id."""
    data = kit.encoded(kit.picture(1), "JPEG")
    members = [("000.jpg", data), ("000.json", json.dumps({"pokemon_species": "Mega  Rayquaza"}).encode())]
    kit.write_tar(tmp_path / "data/train/train-000000.tar", members)
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest/train_manifest.csv").write_text("pokemon_species,count\nmega rayquaza,1\n")
    data_set = DataSet.open(tmp_path, "pokemon_species", "train")
    assert data_set.counts == {"mega rayquaza": 1}
    assert data_set.samples(data_set.shards[0])[0].label == "mega rayquaza"


def test_names_match_whatever_their_case_and_spaces():
    assert canonical("  Mega\tRayquaza ") == "mega rayquaza"
    assert canonical("Pok\u0065\u0301mon") == canonical("pok\u00e9mon")


def test_the_fingerprint_follows_the_data(kit, wds_root):
    before = DataSet.open(wds_root, "species", "train").fingerprint
    assert DataSet.open(wds_root, "species", "train").fingerprint == before
    kit.write_manifest(wds_root / "manifest/train_manifest.csv", {"ada": 2, "bob": 6, "cleo": 13})
    assert DataSet.open(wds_root, "species", "train").fingerprint != before


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="vflora data pack"):
        DataSet.open(tmp_path / "nowhere", "species", "train")


def test_no_shards(tmp_path):
    with pytest.raises(UserError, match=r"no shards .*data/train/\*\.tar.*vflora data pack"):
        DataSet.open(tmp_path, "species", "train")


def test_a_set_that_was_packed_without_validation(tmp_path):
    (tmp_path / "data" / "val").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no pictures for validation: .*larger --val_split, or train without"):
        DataSet.open(tmp_path, "species", "val")


def test_manifest_without_the_key_names_its_columns(wds_root):
    with pytest.raises(UserError, match="'pokemon'.*species, identity_id, count.*--metadata_key"):
        DataSet.open(wds_root, "pokemon", "train")


def test_missing_manifest(wds_root):
    (wds_root / "manifest/train_manifest.csv").unlink()
    with pytest.raises(UserError, match="no manifest"):
        DataSet.open(wds_root, "species", "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"species,count\nada,many\n", "Line 2 .*'many'"),
        (b"species,count\nada\n", "Line 2"),
        (b"species,count\nada,-1\n", "Line 2"),
        (b"species,count\n", "lists no character"),
        (b"species,count\nada,0\n", "lists no character"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
    ],
)
def test_unusable_manifests(wds_root, text, message):
    (wds_root / "manifest/train_manifest.csv").write_bytes(text)
    with pytest.raises(UserError, match=message):
        DataSet.open(wds_root, "species", "train")


def test_json_without_the_key(kit, wds_root):
    members = [("a.png", kit.encoded(kit.picture(1))), ("a.json", b'{"name": "ada"}')]
    kit.write_tar(wds_root / "data/train/train-000000.tar", members)
    with pytest.raises(UserError, match="no field 'species' in its JSON, only name"):
        DataSet.open(wds_root, "species", "train")


def test_a_character_that_the_manifest_lacks(kit, wds_root):
    kit.write_manifest(wds_root / "manifest/train_manifest.csv", {"bob": 6, "cleo": 12})
    with pytest.raises(UserError, match="shows 'ada', which the manifest does not list"):
        DataSet.open(wds_root, "species", "train")


def test_a_truncated_shard(wds_root):
    shard = wds_root / "data/train/train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:4096])
    with pytest.raises(UserError, match="train-000001.tar is cut off"):
        DataSet.open(wds_root, "species", "train")


def test_shards_of_two_sizes(kit, wds_root):
    members = kit.sample_members("wide", "ada", 0, kit.encoded(kit.picture(1, (32, 64))))
    kit.write_tar(wds_root / "data/train/train-000001.tar", members)
    with pytest.raises(UserError, match=r"train-000001.tar: wide is 32x64 .* 32x48: .*--resolution"):
        DataSet.open(wds_root, "species", "train")


def test_a_damaged_first_picture_does_not_decide_the_size(kit, wds_root):
    good = kit.sample_members("good", "ada", 0, kit.encoded(kit.picture(1)))
    kit.write_tar(wds_root / "data/train/train-000000.tar", [*kit.sample_members("bad", "ada", 0, b"\x89PNG"), *good])
    assert DataSet.open(wds_root, "species", "train").size == kit.SIZE


def test_nothing_readable(kit, wds_root):
    for name in ("train-000000.tar", "train-000001.tar"):
        kit.write_tar(Path(wds_root / "data/train" / name), kit.sample_members("bad", "ada", 0, b"\x89PNG"))
    with pytest.raises(UserError, match="no readable picture"):
        DataSet.open(wds_root, "species", "train")
