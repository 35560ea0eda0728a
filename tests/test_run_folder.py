import os
import shutil
import signal

import pytest

import vflora.train
from vflora.cli import parse
from vflora.errors import UserError
from vflora.previews import find_previews
from vflora.run_folder import finished, leave_later, reserved
from vflora.train import run


def test_who_builds_on_a_training_that_was_stopped_ends_with_it(train_flags, tmp_path, monkeypatch):
    learn = vflora.train.learn

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return learn(*arguments)

    monkeypatch.setattr(vflora.train, "learn", stopped)
    run(parse("train", train_flags))
    with pytest.raises(KeyboardInterrupt):
        finished(tmp_path / "run", 4)
    monkeypatch.setattr(vflora.train, "learn", learn)
    last = run(parse("train", [*train_flags, "--resume_from_checkpoint", "latest"]))
    assert finished(tmp_path / "run", 4) == last
    with pytest.raises(KeyboardInterrupt):
        finished(tmp_path / "nothing", 4)


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    with reserved(tmp_path / "run", None):
        (tmp_path / "run" / "checkpoint-3").mkdir()
    with (
        pytest.raises(UserError, match=r"already holds a run \(checkpoint-3\).*--resume_from_checkpoint latest"),
        reserved(tmp_path / "run", None),
    ):
        pass
    for wanted in ("auto", "latest", str(tmp_path / "run" / "checkpoint-3")):
        with reserved(tmp_path / "run", wanted):
            pass


def test_a_run_that_goes_on_from_another_ones_checkpoint_does_not_mix_with_a_third(tmp_path):
    for name in ("run", "other"):
        (tmp_path / name / "checkpoint-2").mkdir(parents=True)
    wanted = str(tmp_path / "other" / "checkpoint-2")
    with (
        pytest.raises(UserError, match=r"already holds a run \(checkpoint-2\).*choose another --output_dir"),
        reserved(tmp_path / "run", wanted),
    ):
        pass
    with reserved(tmp_path / "new", wanted):
        pass


def _files(folder):
    return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_that_goes_back_leaves_later_validations_aside_and_loses_none(trained_run, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(trained_run, folder)
    (folder / "previews" / "step-000004-of-mine").mkdir()
    before = _files(folder)
    leave_later(folder, 4)
    assert not caplog.text
    assert {preview.step for preview in find_previews(folder)} == {2, 4}
    leave_later(folder, 2)
    assert "goes back to step 2: what came after is now called left-1-..." in caplog.text
    assert {preview.step for preview in find_previews(folder)} == {2}
    shutil.copytree(folder / "previews" / "left-1-step-000004", folder / "previews" / "step-000004")
    leave_later(folder, 2)
    shutil.rmtree(folder / "previews" / "left-2-step-000004")
    assert _files(folder) == before
    assert {path.name for path in (folder / "previews").iterdir()} == {
        *("pictures", "step-000002", "step-000002.json", "step-000004-of-mine"),
        *("left-1-step-000004", "left-1-step-000004.json"),
    }


def test_a_heads_training_that_goes_back_leaves_later_pictures_aside(tmp_path):
    (tmp_path / "validation").mkdir()
    for name in ("backbone", "step-000005", "step-000010"):
        (tmp_path / "validation" / f"{name}.png").touch()
    leave_later(tmp_path, 5)
    names = {path.stem for path in (tmp_path / "validation").iterdir()}
    assert names == {"backbone", "step-000005", "left-1-step-000010"}
