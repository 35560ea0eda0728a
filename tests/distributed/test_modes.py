"""`--mode` where several processes train: what goes with them, and what a flag that is given decides."""

import json
from functools import partial

import pytest
import torch

from vflora.cli import parse
from vflora.distributed.processes import World
from vflora.errors import UserError
from vflora.models.speed_config import SpeedConfig
from vflora.student import build_student, require_shareable
from vflora.train import run


@pytest.fixture
def parsed(train_flags, monkeypatch):
    """Settings of a training as one of so many processes reads them."""

    def read(processes, *flags):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return parse("train", [*train_flags, *flags])

    return read


def accepted(settings):
    require_shareable(settings.speed, sharded=settings.distributed.enable_fsdp)


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("fsdp", [[], ["--enable_fsdp", "true"], ["--enable_fsdp", "false"]], ids=["", "true", "false"])
@pytest.mark.parametrize("mode", ["exact", "fast", "low_memory"])
def test_every_mode_works_as_it_stands(parsed, mode, fsdp, sp_size):
    accepted(parsed(2, "--mode", mode, "--sp_size", str(sp_size), *fsdp))


@pytest.mark.parametrize("sp_size", ["1", "2"])
@pytest.mark.parametrize("mode", ["fast", "low_memory"])
def test_a_mode_is_the_same_for_several_processes_each_with_the_whole_base(parsed, mode, sp_size):
    settings = parsed(2, "--mode", mode, "--sp_size", sp_size)
    assert settings.speed == SpeedConfig.preset(mode)
    assert not settings.distributed.enable_fsdp


@pytest.mark.parametrize("processes", [1, 2])
def test_a_base_that_is_whole_on_every_process_is_told(parsed, caplog, processes):
    """It may come from a mode, or from the settings of a run that goes on, where nobody typed it."""
    caplog.set_level("INFO")
    settings = parsed(processes, "--enable_fsdp", "false")
    build_student(settings, torch.float32, torch.device("cpu"), World(0, processes))
    told = "each of the 2 processes keeps the whole base (--enable_fsdp false)" in caplog.messages
    assert told is (processes == 2)


def test_with_the_base_in_pieces_on_purpose_the_mode_says_what_it_leaves_out(parsed, caplog):
    caplog.set_level("INFO")
    settings = parsed(4, "--mode", "fast", "--enable_fsdp", "true")
    left_out = {"rollout_precision": "full", "rollout_graphs": False, "student_graphs": False}
    assert settings.speed == SpeedConfig.preset("fast", **left_out)
    assert settings.distributed.enable_fsdp
    assert [text for text in caplog.messages if text.startswith("--mode")] == [
        "--mode fast on 4 processes leaves out what they cannot have: "
        "--rollout_precision, --rollout_graphs, --student_graphs"
    ]


def test_what_is_given_stays_and_is_refused_with_the_way_out(parsed):
    settings = parsed(2, "--mode", "fast", "--enable_fsdp", "true", "--rollout_graphs")
    assert settings.speed.rollout_graphs
    with pytest.raises(UserError, match="--rollout_graphs does not go with .* drop it, or add --enable_fsdp false"):
        accepted(settings)


def test_a_number_that_is_none_is_left_to_the_parser(parsed):
    with pytest.raises(UserError, match="--sp_size two does not fit: it takes a whole number"):
        parsed(2, "--mode", "fast", "--sp_size", "two")


def test_one_process_and_the_plain_mode_are_left_alone(parsed):
    assert parsed(1, "--mode", "fast").distributed.enable_fsdp
    assert parsed(2).distributed.enable_fsdp
    assert parsed(2, "--mode", "exact").distributed.enable_fsdp


def test_settings_of_one_process_go_on_with_several_as_the_same_recipe(parsed, tmp_path):
    alone = parsed(1, "--mode", "fast")
    (tmp_path / "saved.yaml").write_text(alone.yaml())
    several = parsed(2, "--config", str(tmp_path / "saved.yaml"))
    assert several.speed == alone.speed
    assert not several.distributed.enable_fsdp


def test_from_trajectories_on_the_disk_only_the_students_graphs_matter(parsed, tmp_path):
    settings = parsed(2, "--mode", "fast", "--enable_fsdp", "true", "--trajectory_dir", str(tmp_path))
    assert settings.speed == SpeedConfig.preset("fast", student_graphs=False)


def _train(flags):
    return run(parse("train", flags))


def test_two_processes_train_in_a_mode_with_nothing_else_said(launch, train_flags, tmp_path):
    flags = [*train_flags, "--train_video_length", "5", "--mode", "low_memory", "--max_train_steps", "1"]
    flags += ["--id_decode_tile", "32"]
    launch(2, partial(_train, flags))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["loss/distill"] == 0.0
