import io
import json
import logging
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vflora.data.images import decode, upright_size
from vflora.data.pack import PackConfig, run, sample_key
from vflora.data.schema import DataSet
from vflora.errors import UserError


@pytest.fixture
def folder(kit, tmp_path: Path) -> Path:
    """Two characters, 12 and 5 pictures of 60x90, in folders."""
    for character, count in (("Mega_Rayquaza", 12), ("bob", 5)):
        (tmp_path / "in" / character).mkdir(parents=True)
        for i in range(count):
            kit.picture(len(character) * 100 + i, (60, 90)).save(tmp_path / "in" / character / f"{i}.png")
    return tmp_path / "in"


def config(folder: Path, **settings) -> PackConfig:
    settings = {"resolution": "32x48", "num_workers": 2, **settings}
    return PackConfig(images=folder, output=folder.parent / "out", metadata_key="species", **settings)


def rows(root: Path) -> dict[str, tuple[str, bytes]]:
    """Key -> split and picture, of everything that was packed."""
    found = {}
    for split in ("train", "val"):
        for shard in sorted((root / "data" / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                members = {info.name: tar.extractfile(info).read() for info in tar}
            for name, data in members.items():
                if not name.endswith(".json"):
                    found[name.split(".")[0]] = (split, data)
    return found


def test_packs_folders_into_a_data_set_that_opens(folder):
    summary = run(config(folder))
    train = DataSet.open(folder.parent / "out", "species", "train")
    val = DataSet.open(folder.parent / "out", "species", "val")
    assert train.size == val.size == summary.size == (32, 48)
    assert train.counts == {"mega rayquaza": 11, "bob": 4}
    assert val.counts == {"mega rayquaza": 1, "bob": 1}
    for data in (train, val):
        labels = Counter(sample.label for shard in data.shards for sample in data.samples(shard))
        assert labels == data.counts


@pytest.mark.parametrize(("fit", "enlarged"), [("crop", 17), ("pad", 0)])
def test_pictures_that_had_to_be_enlarged_are_told(folder, fit, enlarged):
    """They are 60x90: to fill 48x96 they grow, on a white sheet of that size they need not."""
    summary = run(config(folder, resolution="48x96", fit=fit))
    assert summary.enlarged == enlarged
    assert any("17 pictures that are smaller than 48x96" in line for line in summary.lines()) == (enlarged > 0)


def test_the_characters_are_listed_with_their_pictures(folder):
    assert "  bob 5, mega rayquaza 12" in run(config(folder)).lines()


def test_what_the_head_would_refuse_is_told(kit, folder):
    """Only one of the two characters has enough pictures to give two."""
    assert "validation split, and 0 have so many" in run(config(folder)).lines()[-1]
    kit.picture(1, (60, 90)).save(folder / "bob/more.png")
    os.rename(folder.parent / "out", folder.parent / "first")
    assert not any("train-head" in line for line in run(config(folder)).lines())


@pytest.mark.parametrize(("fit", "said"), [("crop", True), ("pad", False)])
def test_what_cropping_cuts_off_is_told(kit, folder, fit, said):
    """At a height of 32 the panorama is 960 wide, of which 48 stay; the others have the shape that is wanted."""
    kit.picture(1, (40, 1200)).save(folder / "bob/panorama.png")
    lines = run(config(folder, fit=fit)).lines()
    told = f"cropped: 1 pictures lose more than a quarter of their area, {folder}/bob/panorama.png most (95%)"
    assert any(told in line and "--fit pad" in line for line in lines) == said


def test_pictures_that_are_enlarged_far_too_much_are_named(kit, folder):
    kit.picture(1, (8, 12)).save(folder / "bob/thumbnail.png")
    kit.picture(2, (7, 12)).save(folder / "bob/icon.png")
    (line,) = [line for line in run(config(folder, resolution="32x64")).lines() if "far too much" in line]
    assert line.endswith(f": {folder}/bob/icon.png (5.3 times), {folder}/bob/thumbnail.png (5.3 times)")


def test_metadata_and_manifests_serve_both_trainings(folder):
    run(config(folder))
    with tarfile.open(folder.parent / "out/data/train/train-000000.tar") as tar:
        names = [info.name for info in tar]
        fields = [json.load(tar.extractfile(name)) for name in names if name.endswith(".json")]
    assert len(names) == 2 * len(fields) == 30
    assert {"species": "mega rayquaza", "identity_id": 1} in fields
    assert {"species": "bob", "identity_id": 0} in fields
    text = (folder.parent / "out/manifest/train_manifest.csv").read_text()
    assert text == "species,identity_id,count\nbob,0,4\nmega rayquaza,1,11\n"


def test_the_same_pictures_give_the_same_bytes(folder):
    run(config(folder))
    os.rename(folder.parent / "out", folder.parent / "first")
    run(config(folder, num_workers=1))
    files = sorted(p.relative_to(folder.parent / "out") for p in (folder.parent / "out").rglob("*") if p.is_file())
    assert len(files) == 4
    for file in files:
        assert (folder.parent / "out" / file).read_bytes() == (folder.parent / "first" / file).read_bytes()


def test_another_seed_orders_otherwise(folder):
    run(config(folder))
    first = (folder.parent / "out/data/train/train-000000.tar").read_bytes()
    os.rename(folder.parent / "out", folder.parent / "first")
    run(config(folder, seed=1))
    assert (folder.parent / "out/data/train/train-000000.tar").read_bytes() != first


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_packs_a_table_of_paths(folder, form):
    paths = [(f"bob/{i}.png", "Bob") for i in range(3)] + [("Mega_Rayquaza/1.png", "mega rayquaza")]
    table = folder / f"list.{form}"
    if form == "csv":
        table.write_text("character,path\n" + "".join(f"{name},{path}\n" for path, name in paths))
    else:
        table.write_text("".join(json.dumps({"path": path, "species": name}) + "\n\n" for path, name in paths))
    summary = run(PackConfig(table, folder.parent / "out", "species", resolution="32x48", val_split=0.0))
    assert summary.counts["train"] == {"bob": 3, "mega rayquaza": 1}
    assert summary.counts["val"] == {}
    assert not list((folder.parent / "out/data/val").iterdir())


def test_shards_hold_as_many_as_asked_for(folder):
    run(config(folder, samples_per_shard=4))
    data = DataSet.open(folder.parent / "out", "species", "train")
    assert [len(data.samples(shard)) for shard in data.shards] == [4, 4, 4, 3]


def test_near_duplicates_within_a_character_are_dropped_and_the_largest_stays(kit, folder):
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(
        (180, 120), Image.Resampling.BICUBIC
    )
    smooth.save(folder / "bob/large.png")
    smooth.resize((90, 60), Image.Resampling.LANCZOS).save(folder / "bob/small.jpg", quality=80)
    smooth.save(folder / "Mega_Rayquaza/same.png")
    summary = run(config(folder, val_split=0.0))
    assert summary.duplicates == 1
    assert f"    {folder}/bob/small.jpg looks like {folder}/bob/large.png" in summary.lines()
    assert summary.counts["train"] == {"bob": 6, "mega rayquaza": 13}
    kept = rows(folder.parent / "out")
    assert sample_key("bob", (folder / "bob/large.png").read_bytes()) in kept
    assert sample_key("bob", (folder / "bob/small.jpg").read_bytes()) not in kept


def test_near_duplicates_may_be_kept_but_never_the_same_file_twice(folder):
    for name in ("copy.png", "copy2.png"):
        (folder / "bob" / name).write_bytes((folder / "bob/0.png").read_bytes())
    Image.open(folder / "bob/1.png").save(folder / "bob/again.jpg", quality=95)
    summary = run(config(folder, duplicate_distance=-1, val_split=0.0))
    assert summary.counts["train"]["bob"] == 6
    assert summary.duplicates == 2
    assert (str(folder / "bob/copy2.png"), str(folder / "bob/0.png")) in summary.twins


def test_rotated_transparent_and_grey_pictures_become_upright_rgb(kit, tmp_path):
    folder = tmp_path / "in" / "ada"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = kit.picture(1, (64, 96)).transpose(Image.Transpose.ROTATE_90)
    lying.save(folder / "turned.png", exif=exif)
    Image.new("RGBA", (96, 64), (9, 9, 9, 0)).save(folder / "clear.png")
    kit.picture(2, (64, 96)).convert("L").save(folder / "grey.jpg")
    run(config(tmp_path / "in", image_format="png", val_split=0.0, resolution="64x96"))
    packed = {key: decode(data) for key, (_, data) in rows(tmp_path / "out").items()}
    assert all(image.mode == "RGB" and image.size == (96, 64) for image in packed.values())
    turned = packed[sample_key("ada", (folder / "turned.png").read_bytes())]
    assert turned.tobytes() == kit.picture(1, (64, 96)).tobytes()
    assert packed[sample_key("ada", (folder / "clear.png").read_bytes())].getcolors() == [(96 * 64, (255, 255, 255))]


@pytest.mark.parametrize(("suffix", "form"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_pictures_are_stored_as_asked_for(folder, suffix, form):
    run(config(folder, image_format=suffix))
    for _, data in rows(folder.parent / "out").values():
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == form


@pytest.mark.parametrize(("fit", "border"), [("crop", False), ("pad", True)])
def test_another_shape_is_cropped_or_padded(tmp_path, fit, border):
    (tmp_path / "in/ada").mkdir(parents=True)
    Image.new("RGB", (96, 64), (255, 0, 0)).save(tmp_path / "in/ada/wide.png")
    run(config(tmp_path / "in", resolution="64x64", fit=fit, image_format="png", val_split=0.0))
    ((_, data),) = rows(tmp_path / "out").values()
    assert (decode(data).getpixel((0, 0)) == (255, 255, 255)) == border


def test_by_default_the_size_is_the_models_bucket_for_the_median_shape(kit, tmp_path):
    (tmp_path / "in/ada").mkdir(parents=True)
    for i, size in enumerate([(54, 96), (54, 96), (64, 64)]):
        kit.picture(i, size).save(tmp_path / f"in/ada/{i}.png")
    summary = run(PackConfig(tmp_path / "in", tmp_path / "out", "species"))
    assert summary.size == (480, 848)
    for _, data in rows(tmp_path / "out").values():
        assert upright_size(data) == (480, 848)


def test_unreadable_pictures_are_named_and_left_out(folder, caplog):
    (folder / "bob/broken.jpg").write_bytes(b"nothing")
    (folder / "bob/notes.txt").write_text("not a picture")
    with caplog.at_level(logging.WARNING):
        summary = run(config(folder))
    assert list(summary.unreadable) == [str(folder / "bob/broken.jpg")]
    assert any("broken.jpg" in message for message in caplog.messages)
    assert any("1 files" in message for message in caplog.messages)


def test_too_many_unreadable_pictures_stop_and_nothing_stays(folder):
    for i in range(3):
        (folder / f"bob/broken{i}.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="3 samples cannot be used.*broken0.jpg"):
        run(config(folder, max_bad_samples=2))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["in"]


def test_a_missing_file_of_a_table_counts_as_unreadable(folder):
    table = folder / "list.csv"
    table.write_text("path,character\nbob/1.png,bob\nbob/none.png,bob\n")
    summary = run(PackConfig(table, folder.parent / "out", "species", resolution="32x48"))
    assert list(summary.unreadable) == [str(folder / "bob/none.png")]


@pytest.mark.parametrize("name", ["bob/1.png/2.png", "x" * 300 + ".png", "bob", "\0.png"])
def test_a_path_of_a_table_that_no_file_can_have_counts_as_unreadable(folder, name):
    table = folder / "list.jsonl"
    table.write_text("".join(json.dumps({"path": path, "character": "bob"}) + "\n" for path in ("bob/1.png", name)))
    summary = run(PackConfig(table, folder.parent / "out", "species", resolution="32x48"))
    assert list(summary.unreadable) == [str(folder / name)]


def test_an_output_below_a_file_is_refused(folder):
    with pytest.raises(UserError, match="0.png is a file and no folder: choose another --output"):
        run(PackConfig(folder, folder / "bob/0.png/out", "species", resolution="32x48"))


def test_an_existing_data_set_is_never_overwritten(folder):
    run(config(folder))
    before = (folder.parent / "out/data/train/train-000000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already.*--output"):
        run(config(folder))
    assert (folder.parent / "out/data/train/train-000000.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metadata_key": "count"}, "--metadata_key 'count'"),
        ({"metadata_key": "a b"}, "--metadata_key 'a b'"),
        ({"val_split": 1.0}, "--val_split"),
        ({"resolution": "480"}, "--resolution '480'"),
        ({"resolution": "480x850"}, "multiples of 16: use 480x848"),
        ({"resolution": "0x16"}, "use 16x16"),
        ({"quality": 0}, "--quality"),
        ({"samples_per_shard": 0}, "--samples_per_shard"),
        ({"duplicate_distance": -2}, "--duplicate_distance"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_flag(settings, message):
    with pytest.raises(UserError, match=message):
        PackConfig(**{"images": Path("in"), "output": Path("out"), "metadata_key": "species", **settings})


def test_keys_can_be_read_and_are_safe_in_a_tar():
    assert sample_key("mr. mime / galar", b"1").startswith("mr_mime_galar-")
    assert sample_key("ピカチュウ", b"1").startswith("character-")
    assert sample_key("nidoran♀", b"1") != sample_key("nidoran♂", b"1")
    assert len(sample_key("x" * 500, b"1")) < 60
