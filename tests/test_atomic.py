import json

import pytest

from vflora.atomic import replace_file, require_space, sha256, write_folder, write_or_refuse
from vflora.errors import UserError


def _fill(text):
    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)

    return fill


def _fail(folder):
    (folder / "half.txt").write_text("half")
    raise RuntimeError("power cut")


def test_folder_comes_with_the_digests_of_its_files(tmp_path):
    target = write_folder(tmp_path / "deep" / "x", _fill("one"))
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest == {"inner/a.txt": sha256(target / "inner" / "a.txt")}


def test_a_write_that_fails_leaves_the_old_folder_and_the_next_one_succeeds(tmp_path):
    target = write_folder(tmp_path / "x", _fill("one"))
    with pytest.raises(RuntimeError, match="power cut"):
        write_folder(target, _fail)
    assert (target / "inner" / "a.txt").read_text() == "one"
    write_folder(target, _fill("two"))
    assert (target / "inner" / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "x.txt"
    replace_file(target, lambda path: path.write_text("one"))

    def fail(path):
        path.write_text("ha")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        replace_file(target, fail)
    assert target.read_text() == "one"


def test_too_little_space_is_refused_with_the_advice(tmp_path):
    require_space(tmp_path, 1, "buy a disk.")
    with pytest.raises(UserError, match=r"MiB free.*buy a disk\."):
        require_space(tmp_path, 1 << 60, "buy a disk.")


def test_what_the_disk_refuses_is_told_with_what_it_was_and_how_to_go_on(tmp_path):
    assert write_or_refuse(lambda: 3, "shard", tmp_path, go_on="go on") == 3
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no shard could be written to .*Not a directory.*shards before.*and go on"):
        write_or_refuse(lambda: (tmp_path / "file" / "x").touch(), "shard", tmp_path, go_on="go on")
