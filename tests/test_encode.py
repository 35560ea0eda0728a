import logging
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from vflora.cli import main, parse
from vflora.encode import run as encode
from vflora.models.conditions import ConditionEncoder
from vflora.rollouts import run as roll_out
from vflora.train import run as train

EVERYTHING = [
    *("--train_video_length", "5", "--learning_rate", "3e-2", "--rollout_guidance_scale", "3", "--teacher_check", "1"),
    *("--enable_validation", "--val_num_samples", "2", "--val_video_length", "5"),
]
"""All that asks the encoders for something."""


@pytest.fixture(autouse=True)
def _talkative(caplog):
    caplog.set_level(logging.INFO, logger="vflora")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "conditions"


@pytest.fixture
def flags(train_flags, cache):
    return [*train_flags, "--condition_cache", str(cache), "--max_train_steps", "3"]


def encoding(flags, *extra):
    return parse("encode", [*flags, *extra])


def entries(folder):
    """Digests of what the folder holds, and which of them are prompts."""
    found = {path.stem: path for path in folder.rglob("*") if path.is_file()}
    assert all(path.suffix == ".safetensors" for path in found.values())
    return {digest: "prompt_embeds" in load_file(path) for digest, path in found.items()}


@pytest.fixture(scope="module")
def reference(make_train_flags, tmp_path_factory):
    """The folder of a training that encoded for itself, and its cache."""
    folder = tmp_path_factory.mktemp("reference")
    flags = [*make_train_flags(folder / "run"), "--max_train_steps", "3", *EVERYTHING]
    train(parse("train", [*flags, "--condition_cache", str(folder / "conditions")]))
    return folder


def test_the_training_asks_for_nothing_else_and_learns_the_same(flags, cache, tmp_path, reference, losses, caplog):
    encode(encoding(flags, *EVERYTHING))
    held = entries(cache)
    prompts, pictures = sum(held.values()), len(held) - sum(held.values())
    assert f"{cache} holds all {prompts} prompts and {pictures} pictures: from now on" in caplog.text
    assert "on one process loads no text or vision encoder" in caplog.text
    train(parse("train", [*flags, *EVERYTHING]))
    assert entries(cache) == held == entries(reference / "conditions")
    assert losses(tmp_path / "run") == losses(reference / "run")


@pytest.mark.parametrize("lookahead", ["1", "16"])
def test_nothing_beyond_the_end_of_the_run_is_asked_for(flags, cache, tmp_path, lookahead):
    reused = ["--trajectory_reuse", "2", "--gradient_accumulation_steps", "2", "--batch_size", "2"]
    flags = [*flags, "--train_video_length", "5", *reused, "--condition_lookahead", lookahead]
    encode(encoding(flags))
    held = entries(cache)
    train(parse("train", flags))
    assert entries(cache) == held
    assert sum(held.values()) <= 2 * 2 * 2, "three steps are two blocks"


def test_rollouts_ask_for_nothing_else_with_augmentation_too(flags, tmp_path):
    folder = tmp_path / "trajectories"
    flags = [*flags, *EVERYTHING, "--enable_augmentation", "--batch_size", "2", "--trajectory_dir", str(folder)]
    del flags[flags.index("--condition_cache") :][:2]
    encode(encoding(flags))
    held = entries(folder / "conditions")
    roll_out(parse("rollouts", flags))
    train(parse("train", flags))
    assert entries(folder / "conditions") == held


@pytest.mark.parametrize(
    ("extra", "processes", "named"),
    [([], "2", "2 data-parallel processes"), (["--sp_size", "2"], "1", "one process")],
    ids=["data parallel", "sharing samples"],
)
def test_two_processes_fill_the_same_as_one_without_talking(
    flags, tmp_path, monkeypatch, caplog, extra, processes, named
):
    def filled(name, *line):
        encode(encoding(flags, *EVERYTHING, "--condition_cache", str(tmp_path / name), *line))
        return entries(tmp_path / name)

    alone = filled("alone", "--train_processes", processes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        parts.append(filled(f"part-{rank}", *extra))
        filled("together", *extra)
    assert parts[0] | parts[1] == alone == entries(tmp_path / "together")
    assert all(0 < len(part) < len(alone) for part in parts)
    assert f"when all 2 processes have ended, a training with the same flags on {named} loads no text" in caplog.text


def test_a_stop_ends_after_the_go_in_hand_and_the_same_line_goes_on(flags, cache, monkeypatch, caplog):
    visits, plain = [], ConditionEncoder.prepare

    def stopping(self, prompts, pictures):
        visits.append(len(prompts))
        plain(self, prompts, pictures)
        if len(visits) == 2:
            subprocess.run(["kill", str(os.getpid())], check=True)

    monkeypatch.setattr(ConditionEncoder, "prepare", stopping)
    line = [*flags, "--condition_lookahead", "1"]
    encode(encoding(line))
    assert "stopped after 2 of 3 batches; the same line goes on from there" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    encode(encoding(line))
    assert visits == [1] * 5
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert before.items() < after.items(), "what was there was not made again"
    assert "holds all 3 prompts" in caplog.text


def test_with_augmentation_only_prompts_and_held_out_pictures_are_kept(flags, cache, caplog):
    flags = [*flags, *EVERYTHING, "--enable_augmentation"]
    encode(encoding(flags))
    held = entries(cache)
    assert len(held) - sum(held.values()) == 3, "two of the validation, and the blank one"
    assert "prompts are kept, pictures are not" in caplog.text
    assert "loads no text encoder onto its device" in caplog.text
    train(parse("train", flags))
    assert entries(cache) == held


def test_neither_transformer_nor_backbone_nor_head_is_loaded(flags, cache, small_models, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(small_models / "pipeline", pipeline)
    (weights,) = (pipeline / "transformer").glob("*.safetensors")
    save_file({"nothing": torch.zeros(1)}, weights)
    others = ["--dino_model_dir", "nowhere/dino", "--dino_head_path", "nowhere/head"]
    assert main(["encode", *flags, "--pipeline_dir", str(pipeline), *others]) == 0
    assert len(entries(cache)) > 3


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--prompt_bank", "nothing.yaml"], "nothing.yaml"),
        (["--pipeline_dir", "nowhere/at/all"], "There is no model at nowhere/at/all"),
        (["--train_processes", "0"], "--train_processes must be at least 1"),
        (["--condition_cache", __file__], "is a file and no folder: choose another --condition_cache"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(flags, tmp_path, capsys, wrong, sentence):
    assert main(["encode", *flags, *wrong]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


def test_without_a_folder_to_fill_it_refuses(train_flags, capsys):
    assert main(["encode", *train_flags]) == 2
    assert "vflora encode needs --condition_cache: the folder that it shall fill." in capsys.readouterr().err


def test_an_encoder_that_is_missing_is_named_before_anything_is_loaded(flags, small_models, tmp_path, capsys, caplog):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(small_models / "pipeline", pipeline)
    shutil.rmtree(pipeline / "text_encoder")
    assert main(["encode", *flags, "--pipeline_dir", str(pipeline)]) == 2
    message = capsys.readouterr().err
    assert str(pipeline / "text_encoder") in message
    assert "go on with `hf download" in message
    assert "loading" not in caplog.text
