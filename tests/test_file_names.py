from vflora.file_names import first_free


def test_a_name_that_is_taken_is_numbered_before_its_suffix(tmp_path):
    wanted = tmp_path / "a.b.mp4"
    for name in ("a.b.mp4", "a.b-2.mp4", "a.b-3.mp4"):
        assert first_free(wanted) == tmp_path / name
        (tmp_path / name).touch()


def test_who_asks_says_what_is_free(tmp_path):
    (tmp_path / "a.md").touch()
    assert first_free(tmp_path / "a.md", lambda path: True) == tmp_path / "a.md"
