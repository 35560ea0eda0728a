import json
import os
import time

import pytest
import yaml

from vflora.errors import UserError
from vflora.run_log import RunLog
from vflora.watch.curves import curves
from vflora.watch.run_state import read_run
from vflora.watch.view import duration


@pytest.fixture
def folder(tmp_path):
    """A run of 100 steps with 40 done, written by the real log."""
    log = RunLog(tmp_path, "none", start_step=0, config={})
    for step in range(10, 50, 10):
        parts = {"seconds/data": 0.5, "seconds/rollout": 3.0, "seconds/step": 4.0}
        log.scalars(step, {"loss/distill": step / 100, "gradient_norm": float("nan"), **parts})
    log.scalars(40, {"val/motion_ratio": 0.9, "seconds/validation": 60.0})
    log.close()
    settings = {"max_train_steps": 100, "val_every_steps": 40, "log_every_steps": 10}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_the_time_left_counts_steps_and_validations(folder):
    run = read_run(folder)
    assert (run.step, run.total, run.is_done) == (40, 100, False)
    assert run.seconds_left() == 60 * 4.0 + 2 * 60.0
    assert run.step_split() == {"data": 0.5, "rollout": 3.0, "other": 0.5}


def test_numbers_that_are_not_finite_and_a_line_being_written_are_left_out(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "loss/dist')
    run = read_run(folder)
    assert run.series("loss/distill") == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)]
    assert run.series("gradient_norm") == []
    assert run.last("val/motion_ratio") == 0.9


def test_a_run_that_says_nothing_for_long_is_called_quiet_unless_it_is_done(folder):
    assert not read_run(folder).is_quiet
    os.utime(folder / "metrics.jsonl", (time.time() - 1000, time.time() - 1000))
    assert read_run(folder).is_quiet
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, "seconds/step": 4.0}) + "\n")
    os.utime(folder / "metrics.jsonl", (time.time() - 1000, time.time() - 1000))
    run = read_run(folder)
    assert run.is_done
    assert not run.is_quiet
    assert run.seconds_left() == 0


@pytest.mark.parametrize("log_every", ["log_every_steps", "log_every"])
def test_a_training_is_not_quiet_before_its_next_lines_are_due_under_either_name_of_their_distance(tmp_path, log_every):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({log_every: 25}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 25, "seconds/step": 8.0}\n')
    for age, is_quiet in ((150, False), (700, True)):
        os.utime(tmp_path / "metrics.jsonl", (time.time() - age, time.time() - age))
        assert read_run(tmp_path).is_quiet is is_quiet


def test_a_run_that_has_only_begun_can_be_watched(tmp_path):
    (tmp_path / "config.yaml").write_text("max_train_steps: 100\n")
    run = read_run(tmp_path)
    assert (run.step, run.age_s, run.seconds_left(), run.step_split()) == (0, None, None, {})


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the --output_dir of a training run"):
        read_run(tmp_path)


def test_long_curves_are_thinned_and_smoothed_and_end_at_the_newest_step():
    drawn = curves({"loss": [(step, 1.0 + step % 2) for step in range(1, 5001)]}, "a loss")
    raw, smooth = drawn.split("<polyline")[1:]
    assert "raw" in raw
    points = [tuple(map(float, pair.split(","))) for pair in smooth.split('points="')[1].split('"')[0].split()]
    assert 200 <= len(points) <= 240
    assert points[-1][0] == max(x for x, _ in points) == 348.0  # the right edge
    assert max(y for _, y in points[20:]) - min(y for _, y in points[20:]) < 5  # of 230 pixels: the zigzag is gone


def test_a_curve_without_values_is_not_drawn_and_one_value_is_a_dot():
    assert curves({"loss": []}, "nothing") is None
    assert "<circle" in curves({"loss": [(3, 0.0)]}, "one")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.4, "4 s"), (61, "1 min 1 s"), (1800, "30 min"), (3599.6, "1 h 0 min"), (7260, "2 h 1 min"), (1e5, "1 d 3 h")],
)
def test_times_are_said_in_their_two_largest_units(seconds, text):
    assert duration(seconds) == text
