import pytest
import yaml

from vflora.watch.run_state import read_run
from vflora.watch.view import render_parts


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_validation": False, "val_every_steps": 50}, "train with --enable_validation"),
        ({"enable_validation": True, "val_every_steps": 50}, "The first ones come at step 50."),
    ],
)
def test_where_there_are_no_clips_yet_the_page_says_when_they_come_or_which_flag_makes_them(tmp_path, settings, said):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert said in render_parts(read_run(tmp_path), str)["previews"]


def test_the_page_of_a_heads_training_speaks_of_no_clips_since_it_can_make_none(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"total_steps": 100, "val_every": 50, "log_every": 25}))
    parts = render_parts(read_run(tmp_path), str)
    assert parts["previews"] == ""
    assert "The first numbers come at step 25." in parts["plots"]
