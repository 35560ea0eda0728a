import dataclasses
import json
import math

import pytest

from vflora.report.records import BASE


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, make_comparison):
    return make_comparison(tmp_path_factory.mktemp("records"))


def with_motion(comparison, scale, ratio):
    rows = tuple(
        dataclasses.replace(
            row,
            clips=tuple(dataclasses.replace(c, motion_ratio=ratio) if c.scale == scale else c for c in row.clips),
        )
        for row in comparison.rows
    )
    return dataclasses.replace(comparison, rows=rows)


def test_the_best_scale_has_most_identity_among_those_that_keep_the_motion(comparison):
    assert comparison.identity(1.0) > comparison.identity(0.5) > comparison.identity(BASE)
    assert comparison.best_scale == 0.5  # at 1.0 only 60 % of the motion is left
    assert with_motion(comparison, 1.0, 0.85).best_scale == 1.0


def test_where_no_scale_keeps_the_motion_the_one_that_keeps_most_is_best(comparison):
    assert with_motion(comparison, 0.5, 0.7).best_scale == 0.5
    assert with_motion(comparison, 0.5, 0.5).best_scale == 1.0


def test_rows_come_best_first_and_worst_second(comparison):
    assert [row.character for row in comparison.ranked()] == ["Momo", "Zig", "Pip"]
    assert comparison.rows[1].gain(0.5) < 0 < comparison.rows[2].gain(0.5)
    assert comparison.better(0.5) == 2


def test_the_json_holds_every_number_and_no_infinity(comparison):
    data = with_motion(comparison, 0.5, math.inf).as_json()
    text = json.dumps(data, allow_nan=False)
    clip = json.loads(text)["rows"][0]["clips"][1]
    assert clip["motion_ratio"] is None
    assert len(clip["identity"]["cosines"]) == 24
    assert clip["teacher_deviation_by_sigma"] == {"0.50-0.75": 0.005}
    assert data["summary"].keys() == {"0", "0.5", "1"}
