from pathlib import Path

import pytest

from vflora.data.sources import Source, read_sources
from vflora.errors import UserError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_a_folder_per_character_however_deep_and_whatever_the_case(tmp_path):
    deep = touch(tmp_path / "Mega_Rayquaza/web/more/1.JPG")
    flat = touch(tmp_path / "bob/2.webp")
    touch(tmp_path / "bob/.hidden/3.png")
    touch(tmp_path / ".cache/4.png")
    assert read_sources(tmp_path, "species") == [Source("bob", flat), Source("mega rayquaza", deep)]


def test_a_characters_folder_may_be_a_link(tmp_path):
    touch(tmp_path / "elsewhere/deep/1.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bob").symlink_to(tmp_path / "elsewhere")
    linked = tmp_path / "in/ada/2.png"
    linked.parent.mkdir()
    linked.symlink_to(tmp_path / "elsewhere/deep/1.png")
    assert read_sources(tmp_path / "in", "species") == [
        Source("ada", linked),
        Source("bob", tmp_path / "in/bob/deep/1.png"),
    ]


def test_links_that_go_round_or_nowhere_are_named_and_left_out(tmp_path, caplog):
    flat = touch(tmp_path / "in/bob/1.png")
    (tmp_path / "in/again").symlink_to(tmp_path / "in")
    (tmp_path / "in/above").symlink_to(tmp_path)
    (tmp_path / "in/bob/round").symlink_to(tmp_path / "in/bob")
    (tmp_path / "in/bob/gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/lost").symlink_to(tmp_path / "nowhere")
    assert read_sources(tmp_path / "in", "species") == [Source("bob", flat)]
    for name in ("again leads back", "above leads back", "round is not", "gone.png is not", "lost is not"):
        assert name in caplog.text


def test_names_that_begin_with_repeats_are_warned_of(tmp_path, caplog):
    touch(tmp_path / "10_ohwx cat/1.png")
    touch(tmp_path / "2b android/1.png")
    read_sources(tmp_path, "species")
    assert "(10_ohwx cat): rename them" in caplog.text
    caplog.clear()
    (tmp_path / "t.csv").write_text("path,character\na.png,3_bob\nb.png,ada\n")
    read_sources(tmp_path / "t.csv", "species")
    assert "(3_bob): rename them" in caplog.text


def test_captions_are_named_as_not_used(tmp_path, caplog):
    for name in ("1.png", "1.txt", "2.JPG", "2.txt", "notes.txt"):
        touch(tmp_path / "bob" / name)
    read_sources(tmp_path, "species")
    assert "2 captions (.txt) are not used: prompts come from --prompt_bank" in caplog.text
    assert "1 files" in caplog.text
    caplog.clear()
    (tmp_path / "t.csv").write_text("path,text,caption\na.png,ada,she walks\n")
    assert read_sources(tmp_path / "t.csv", "text") == [Source("ada", tmp_path / "a.png")]
    assert "The column 'caption' of" in caplog.text
    assert "The column 'text' of" not in caplog.text


def test_pictures_of_another_kind_are_counted_and_to_be_converted(tmp_path, caplog):
    for name in ("1.HEIC", "2.heic", "3.heic", "notes.txt", "README"):
        touch(tmp_path / "bob" / name)
    with pytest.raises(UserError, match=r"only 3 .heic, 1 .txt, 1 without a suffix in .*: convert .heic to JPEG"):
        read_sources(tmp_path, "species")
    touch(tmp_path / "bob/4.png")
    read_sources(tmp_path, "species")
    assert "left out (3 .heic, 1 .txt, 1 without a suffix): convert .heic to JPEG." in caplog.text


def test_a_table_with_either_name_for_the_character(tmp_path):
    table = tmp_path / "t.csv"
    for column in ("character", "species"):
        table.write_text(f"\ufeffpath,{column}\na/1.png, Ada \na/1.png,ada\n", encoding="utf-8")
        assert read_sources(table, "species") == [Source("ada", tmp_path / "a/1.png")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", b"path,name\na.png,ada\n", "Line 2 of .*t.csv lacks text for 'path' or for 'character'"),
        ("t.csv", b"path,name\na.png,ada\n", "'character' or 'species': .* has the columns path, name"),
        ("t.csv", b"file,character\na.png,ada,more\n", "has the columns file, character"),
        ("t.csv", b"path;character\na.png;ada\n", "looks separated by ';' where commas belong"),
        ("t.csv", b"path\tcharacter\na.png\tada\n", "looks separated by tabs"),
        ("t.jsonl", b"{}\n", "has the columns none"),
        ("t.csv", b"path,character\n,ada\n", "Line 2"),
        ("t.csv", b"path,character\na.png\n", "Line 2"),
        ("t.csv", b"\xff\xfe\x00\x81", "not a CSV file in UTF-8"),
        ("t.jsonl", b'{"path": "a.png", "character": 3}\n', "Line 1"),
        ("t.jsonl", b'{"path": "a.png", "character": "ada"}\nnonsense\n', "Line 2 .* is not JSON"),
        ("t.jsonl", b'["a.png"]\n', "not a JSON object"),
        ("t.jsonl", b'{"path": "\xe9.png", "character": "ada"}\n', "not a JSONL file in UTF-8"),
        ("t.jsonl", b"", "no jpg, jpeg, png, webp pictures"),
        ("t.xlsx", b"", "neither a folder nor"),
    ],
)
def test_unusable_tables(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message):
        read_sources(tmp_path / name, "species")


def test_a_column_is_named_once_where_both_names_are_one(tmp_path):
    (tmp_path / "t.csv").write_text("path,name\na.png,ada\n")
    with pytest.raises(UserError, match="for 'path' or for 'character': every line"):
        read_sources(tmp_path / "t.csv", "character")


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no folder or table"):
        read_sources(tmp_path / "nowhere", "species")
    with pytest.raises(UserError, match="one folder per character"):
        read_sources(tmp_path, "species")


def test_a_picture_outside_the_characters_folders(tmp_path):
    touch(tmp_path / "lost.png")
    with pytest.raises(UserError, match="lost.png lies in no character's folder"):
        read_sources(tmp_path, "species")
