import os
import signal

import pytest

import vflora.train
from vflora.cli import parse
from vflora.errors import UserError
from vflora.run_folder import finished, reserved
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
