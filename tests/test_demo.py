import pytest

from vflora.demo import DemoConfig, run
from vflora.errors import UserError


def test_what_is_in_the_place_of_the_folder_is_refused_and_kept(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for place, fix in ((file, "is a file and no folder: choose another --output"), (tmp_path, "name another folder")):
        with pytest.raises(UserError, match=fix):
            run(DemoConfig(output=place))
    assert file.read_text() == "mine"
