import logging

import pytest
from PIL import Image

from vflora.errors import UserError
from vflora.samples import find_samples


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def find(*paths, prompts=None, seeds=(1,), max_rows=12):
    return find_samples(paths, prompts=prompts, prompt_bank=None, seeds=seeds, max_rows=max_rows)


def test_files_and_folders_name_their_characters(tmp_path):
    picture(tmp_path / "flat" / "little_wren.png")
    picture(tmp_path / "flat" / "Momo.webp")
    picture(tmp_path / "deep" / "zig zag" / "b.png", "blue")
    picture(tmp_path / "deep" / "zig zag" / "a.png", "lime")
    (tmp_path / "deep" / "zig zag" / "notes.txt").write_text("no picture")
    samples = find(tmp_path / "flat", tmp_path / "deep")
    assert [s.character for s in samples] == ["Momo", "little wren", "zig zag"]
    assert samples[2].picture.getpixel((0, 0)) == (0, 255, 0)


def test_hidden_files_and_folders_are_no_characters(tmp_path):
    for folder in (tmp_path / "flat", tmp_path / "deep" / "momo"):
        picture(folder / "0.png")
        (folder / "._0.png").write_bytes(b"what macOS notes of a file on another disk")
    picture(tmp_path / "deep" / ".trash" / "zig.png")
    assert [s.character for s in find(tmp_path / "flat", tmp_path / "deep")] == ["0", "momo"]


def test_one_prompt_serves_all_and_several_go_in_order(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    assert [s.prompt for s in find(tmp_path, prompts=["{character} runs"])] == ["a runs", "b runs"]
    assert [s.prompt for s in find(tmp_path, prompts=["one", "two"])] == ["one", "two"]
    with pytest.raises(UserError, match="3 texts for 2 pictures"):
        find(tmp_path, prompts=["one", "two", "three"])


def test_without_prompts_the_bank_gives_each_its_own_and_always_the_same(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    first, again = find(tmp_path), find(tmp_path)
    assert [s.prompt for s in first] == [s.prompt for s in again]
    assert first[0].prompt.startswith("a ")
    assert first[0].prompt[1:] != first[1].prompt[1:]


def test_every_seed_is_a_row_and_what_is_too_many_is_left_out_with_a_word(tmp_path, caplog):
    for name in "ab":
        picture(tmp_path / f"{name}.png")
    assert [(s.character, s.seed) for s in find(tmp_path, seeds=(1, 2))] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    with caplog.at_level(logging.WARNING):
        assert len(find(tmp_path, seeds=(1, 2), max_rows=3)) == 3
    assert "1 rows are left out" in caplog.text
