import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vflora.previews import (
    PreviewSample,
    contact_sheet,
    file_name,
    find_previews,
    step_folder,
    write_index,
    write_preview,
)
from vflora.video_io import read_mp4


@pytest.fixture(scope="module")
def board(trained_run):
    events = EventAccumulator(
        str(trained_run / "tensorboard"), size_guidance={"images": 0, "histograms": 0, "scalars": 0}
    )
    events.Reload()
    return events


def test_tensorboard_has_scalars_previews_and_histograms_of_the_cosine(trained_run, board):
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss/total", "loss/distill", "loss/identity", "seconds/step", "val/motion_ratio"):
        wanted = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in board.Scalars(name)] == wanted
        assert wanted

    previews = find_previews(trained_run)
    assert [preview.step for preview in previews] == [2, 2, 4, 4]
    assert set(board.Tags()["images"]) == {f"preview/{preview.sample.name}" for preview in previews}
    for preview in previews:
        event = next(e for e in board.Images(f"preview/{preview.sample.name}") if e.step == preview.step)
        sheet = contact_sheet(preview)
        assert (event.width, event.height) == sheet.size
        assert sheet.width > sheet.height > 2 * 160  # five frames of the teacher above those of the student

    histograms = board.Histograms("cosine")
    assert [event.step for event in histograms] == [1, 2, 3, 4]
    for event, row in zip(histograms, (r for r in rows if "cosine/last_frame" in r), strict=True):
        values = event.histogram_value
        assert values.num == 5  # frames of the one sample
        assert -1 <= values.min <= row["cosine/last_frame"] <= values.max <= 1


def test_every_preview_knows_whom_it_shows_and_how_that_scored(trained_run):
    metrics = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    for preview in find_previews(trained_run, 4):
        assert preview.sample.character in preview.sample.prompt
        frames, _ = read_mp4(preview.video)
        assert frames.shape == (5, 32, 64, 3)
        with Image.open(preview.picture) as picture:
            assert picture.size == (64, 64)
    means = next(row for row in metrics if row["step"] == 4 and "val/motion_ratio" in row)
    for name in ("val/student_cosine_mean", "val/teacher_motion", "val/teacher_deviation"):
        values = [preview.sample.numbers[name] for preview in find_previews(trained_run, 4)]
        assert sum(values) / 2 == pytest.approx(means[name])
    assert means["seconds/validation"] > 0


def test_keys_become_plain_file_names_that_stay_apart():
    assert file_name("red-fox_0001") == "red-fox_0001"
    names = [file_name(key) for key in ("../../etc/x", "a/b", "a.b", "a-b", "..", "")]
    assert len(set(names)) == len(names)
    for name in names:
        assert name
        assert not set(name) & set("/.\\")


def test_the_teacher_is_left_and_above_and_an_unfinished_step_is_shown_by_its_file_names(tmp_path):
    folder = step_folder(tmp_path, 7)
    white, black = torch.ones(3, 5, 32, 32), -torch.ones(3, 5, 32, 32)
    write_preview(folder, "one", torch.full((3, 32, 32), 200, dtype=torch.uint8), white, black)
    (preview,) = find_previews(tmp_path)
    assert (preview.step, preview.sample) == (7, PreviewSample("one", "one", ""))
    frames = read_mp4(preview.video)[0].astype(int)
    assert frames[:, :, :30].min() > 225
    assert frames[:, :, 34:].max() < 30
    sheet = np.asarray(contact_sheet(preview).convert("L"))
    assert sheet[60, -40] > 225
    assert sheet[-60, -40] < 30
    write_index(folder, [PreviewSample("one", "red fox", "a red fox runs", {"val/student_motion": 0.5})])
    (preview,) = find_previews(tmp_path, 7)
    assert preview.sample.character == "red fox"
    assert preview.sample.numbers == {"val/student_motion": 0.5}
