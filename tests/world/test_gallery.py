import json

import pytest
from PIL import Image

from vflora.data.pack import PackConfig
from vflora.data.pack import run as pack
from vflora.errors import UserError
from vflora.video_io import read_mp4
from vflora.world.characters import character_name
from vflora.world.gallery import RenderConfig, run
from vflora.world.stills import write_still_folder


def test_render_writes_a_sheet_clips_a_grid_and_the_truth(tmp_path):
    run(RenderConfig(tmp_path, domain="geometric", count=2, frames=5))
    with Image.open(tmp_path / "geometric_characters.png") as sheet:
        assert min(sheet.size) > 1000
    with Image.open(tmp_path / "geometric_clips.png") as grid:
        assert grid.width > 5 * 128
    records = json.loads((tmp_path / "geometric_clips.json").read_text())
    assert len(records) == 2
    for record in records:
        frames, fps = read_mp4(tmp_path / record["file"])
        assert frames.shape == (5, 256, 256, 3)
        assert fps == 12
        assert record["name"] == character_name(record["character"], domain="geometric")
        assert record["name"] in record["prompt"]
        assert record["motion"] in record["prompt"]
        assert len(record["centers"]) == len(record["phases"]) == len(record["visible_pixels"]) == 5
    assert not (tmp_path / "creatures_clips.json").exists()


def test_the_same_seed_shows_the_same_clips(tmp_path):
    truth = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(RenderConfig(tmp_path / name, domain="geometric", count=1, frames=1, seed=seed))
        truth.append((tmp_path / name / "geometric_clips.json").read_text())
    assert truth[0] == truth[1] != truth[2]


def test_stills_come_as_a_folder_for_each_character(tmp_path):
    folder = write_still_folder(tmp_path / "stills", domain="creatures", split="dev", per_character=3, seed=0, limit=2)
    names = {character_name(k, domain="creatures") for k in (384, 385)}
    assert {p.name for p in folder.iterdir()} == names
    for name in names:
        pictures = sorted((folder / name).iterdir())
        assert [p.name for p in pictures] == ["00.png", "01.png", "02.png"]
        with Image.open(pictures[0]) as picture:
            assert (picture.format, picture.size, picture.mode) == ("PNG", (64, 64), "RGB")
        assert len({p.read_bytes() for p in pictures}) == 3


def test_stills_can_be_packed(tmp_path):
    folder = write_still_folder(tmp_path / "stills", domain="creatures", split="dev", per_character=6, seed=0, limit=3)
    summary = pack(PackConfig(images=folder, output=tmp_path / "shards", metadata_key="creature", resolution="64x64"))
    assert summary.size == (64, 64)
    assert not summary.unreadable
    assert set(summary.counts["train"]) == {character_name(k, domain="creatures") for k in (384, 385, 386)}


def test_stills_do_not_mix_with_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="name a new folder"):
        write_still_folder(tmp_path, domain="creatures", split="dev", per_character=1, seed=0)
    with pytest.raises(UserError, match="at least one"):
        write_still_folder(tmp_path / "new", domain="creatures", split="dev", per_character=0, seed=0)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"frames": 0}, {"size": 8}, {"stills": -1}])
def test_impossible_settings_are_refused(tmp_path, wrong):
    with pytest.raises(UserError):
        RenderConfig(tmp_path, **wrong)
