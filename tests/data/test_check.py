import json
from pathlib import Path

import pytest

from vflora.data.check import CheckConfig, Problem, check, run, table
from vflora.data.pack import PackConfig
from vflora.data.pack import run as pack
from vflora.errors import UserError


def problems(root: Path, **settings) -> list[Problem]:
    return check(CheckConfig(root, num_workers=2, **settings)).problems


def shard_with(kit, root: Path, members) -> None:
    """Adds a shard, and counts what it holds in the manifest."""
    kit.write_tar(root / "data/train/train-000002.tar", members)
    kit.write_manifest(root / "manifest/train_manifest.csv", {"ada": 3, "bob": 6, "cleo": 12})


def good(kit, key="good", character="ada", identity=0, size=None):
    return kit.sample_members(key, character, identity, kit.encoded(kit.picture(1, size or kit.SIZE)))


@pytest.fixture
def wds_root(wds_root: Path) -> Path:
    """As in conftest, without its validation split, whose keys are those of the training split."""
    for path in (wds_root / "data/val/val-000000.tar", wds_root / "manifest/val_manifest.csv"):
        path.unlink()
    return wds_root


def test_a_whole_data_set_passes(wds_root, capsys):
    assert run(CheckConfig(wds_root)) == 0
    assert "20 samples of 3 characters, 32x48 (train 20, val 0): nothing is wrong." in capsys.readouterr().out


@pytest.mark.parametrize("val_by", ["sample", "identity"])
def test_what_pack_writes_passes(kit, tmp_path, val_by):
    for i in range(12):
        path = tmp_path / f"in/{'abc'[i % 3]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        kit.picture(i).save(path)
    pack(PackConfig(tmp_path / "in", tmp_path / "out", "species", resolution="32x48", val_split=0.3, val_by=val_by))
    assert problems(tmp_path / "out") == []


def test_what_the_head_would_refuse_is_told_and_is_nothing_wrong(kit, wds_root, tmp_path, capsys):
    assert run(CheckConfig(wds_root)) == 0
    assert "train-head needs two characters with 2 pictures in the validation split" in capsys.readouterr().out
    kit.write_data_set(tmp_path / "one", {"ada": 8})
    assert run(CheckConfig(tmp_path / "one")) == 0
    assert "nothing is wrong.\ntrain-head needs at least two characters" in capsys.readouterr().out


def test_everything_wrong_is_listed_at_once(kit, wds_root, capsys):
    broken = [
        *kit.sample_members("torn", "ada", 0, kit.encoded(kit.picture(1))[:90]),
        *good(kit, "wide", size=(32, 64)),
    ]
    shard_with(kit, wds_root, [*good(kit), *broken])
    shard = wds_root / "data/train/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:4000])
    assert run(CheckConfig(wds_root)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "sample", "what", "is", "wrong"]
    for file, sample, what in [
        ("train-000000.tar", "-", "cut off"),
        ("train-000002.tar", "torn", "damaged"),
        ("train-000002.tar", "wide", "is 32x64, the first one 32x48"),
        ("train_manifest.csv", "-", "'bob' has count 6, the shards hold 3"),
    ]:
        assert any(file in line and f" {sample} " in line and what in line for line in lines), (file, sample, what)
    assert "problems." in lines[-1]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"identity_id": 0}, "nothing for 'species'"),
        ({"species": 7, "identity_id": 0}, "7 for 'species'"),
        ({"species": "ada", "identity_id": "zero"}, "'zero' for 'identity_id'"),
        ({"species": "ada", "identity_id": True}, "True for 'identity_id'"),
        ({"species": "ada", "identity_id": 9}, "'ada' has identity_id 9, elsewhere 0"),
        ({"species": "eve", "identity_id": 1}, "identity_id 1 of 'eve' belongs to 'bob'"),
    ],
)
def test_metadata_that_does_not_fit(kit, wds_root, fields, what):
    members = [("odd.png", kit.encoded(kit.picture(1))), ("odd.json", json.dumps(fields).encode())]
    shard_with(kit, wds_root, members)
    found = [p for p in problems(wds_root) if p.sample == "odd"]
    assert [p.file for p in found] == ["train-000002.tar"]
    assert what in found[0].what


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([("odd.json", b'{"species": "ada", "identity_id": 0}')], "has none"),
        ([("odd.png", b"x")], "no JSON"),
        ([("odd.png", b"x"), ("odd.json", b"{")], "cannot be parsed"),
    ],
)
def test_incomplete_samples(kit, wds_root, members, what):
    shard_with(kit, wds_root, members)
    assert any(p.sample == "odd" and what in p.what for p in problems(wds_root))


def test_an_oversized_picture(wds_root):
    found = problems(wds_root, max_megapixels=0.001)
    assert len(found) == 20
    assert all("megapixels" in p.what for p in found)


def test_a_damaged_header_in_the_middle(wds_root):
    shard = wds_root / "data/train/train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"bob-3.json") + 150] ^= 0xFF
    shard.write_bytes(data)
    assert Problem("train-000001.tar", "", "the archive is damaged in the middle, after sample 'bob-1'") in problems(
        wds_root
    )


def test_what_the_manifest_misses_or_invents(kit, wds_root):
    kit.write_manifest(wds_root / "manifest/train_manifest.csv", {"ada": 2, "bob": 6, "zoe": 4})
    found = [p.what for p in problems(wds_root) if p.file == "train_manifest.csv"]
    assert "'cleo' is not listed, the shards hold 12" in found
    assert "line 4: 'zoe' has count 4, the shards hold 0" in found


def test_a_character_listed_twice(wds_root):
    path = wds_root / "manifest/train_manifest.csv"
    path.write_text(path.read_text() + "ADA,0,2\n")
    assert [p.what for p in problems(wds_root)] == ["line 5: 'ada' is listed twice"]


def test_one_sample_in_both_splits(kit, wds_root):
    kit.write_data_set(wds_root, {"ada": 1}, split="val", shards=1)
    assert [(p.file, p.sample) for p in problems(wds_root)] == [("val-000000.tar", "ada-0")]


def test_identity_numbers_for_some_samples_only(kit, wds_root):
    members = [("odd.png", kit.encoded(kit.picture(1))), ("odd.json", b'{"species": "ada"}')]
    shard_with(kit, wds_root, members)
    assert [p.what for p in problems(wds_root)] == ["1 samples lack identity_id, the others have it"]


def test_a_data_set_without_identity_numbers_is_fine_for_one_training(kit, tmp_path, capsys):
    """The reference's own shards."""
    members = [("1.png", kit.encoded(kit.picture(1))), ("1.json", b'{"pokemon_species": "ada"}')]
    kit.write_tar(tmp_path / "data/train/train-000000.tar", members)
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest/train_manifest.csv").write_text("pokemon_species,count\nada,1\n")
    assert run(CheckConfig(tmp_path)) == 0
    assert "not for `vflora train-head`" in capsys.readouterr().out


def test_a_missing_manifest_and_missing_shards(wds_root):
    (wds_root / "manifest/train_manifest.csv").unlink()
    with pytest.raises(UserError, match="--metadata_key"):
        problems(wds_root)
    assert any("no manifest" in p.what for p in problems(wds_root, metadata_key="species"))
    for shard in (wds_root / "data/train").glob("*.tar"):
        shard.unlink()
    assert any("no shards" in p.what for p in problems(wds_root, metadata_key="species"))


def test_no_data_set(tmp_path):
    with pytest.raises(UserError, match="no data set"):
        run(CheckConfig(tmp_path / "nowhere"))


@pytest.mark.parametrize("settings", [{}, {"metadata_key": "species"}])
def test_a_folder_of_pictures_is_to_be_packed_first(kit, tmp_path, settings):
    (tmp_path / "bob").mkdir()
    kit.picture(1).save(tmp_path / "bob/1.png")
    with pytest.raises(UserError, match="no packed data set: run `vflora data pack` first"):
        run(CheckConfig(tmp_path, **settings))


def test_several_columns_ask_for_the_key(wds_root):
    path = wds_root / "manifest/train_manifest.csv"
    path.write_text("species,colour,identity_id,count\n")
    with pytest.raises(UserError, match="species, colour.*--metadata_key"):
        run(CheckConfig(wds_root))


def test_the_table_has_columns():
    lines = table([Problem("a.tar", "k", "torn"), Problem("manifest.csv", "", "short")])
    assert lines == [
        "file          sample  what is wrong",
        "-----------------------------------",
        "a.tar         k       torn",
        "manifest.csv  -       short",
    ]
    assert table([]) == []
