import io
import json
import os
import signal
import subprocess
import sys
import tarfile

import pytest
import webdataset
from safetensors.torch import load

import vflora.train
from vflora.cli import main, parse
from vflora.models.denoiser import Denoiser
from vflora.rollouts import run as roll_out
from vflora.train import run as train


@pytest.fixture
def flags(train_flags, tmp_path):
    """The shortest clip, four steps, two rollouts in a shard."""
    return [*train_flags, "--train_video_length", "5", "--learning_rate", "3e-2", "--harvest_count", "1"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "trajectories"


def rolled_out(flags, folder, *extra):
    settings = [*flags, "--trajectory_dir", str(folder), "--rollouts_per_shard", "2", *extra]
    return roll_out(parse("rollouts", settings))


def trained(flags, output_dir, *extra):
    return train(parse("train", [*flags, "--output_dir", str(output_dir), *extra]))


def losses(output_dir):
    """Every loss to the last bit, by step."""
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: [float(r[k]).hex() for k in ("loss/distill", "loss/identity", "gradient_norm")] for r in rows}


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def refuse(*_args, **_kwargs):
    raise AssertionError("not needed by a run from disk")


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--trajectory_reuse", "3", "--gradient_accumulation_steps", "2", "--max_train_steps", "5"],
        ["--batch_size", "2", "--enable_augmentation", "--p_secondary", "0.5", "--num_workers", "2"],
        ["--rollout_guidance_scale", "2", "--rollout_stride", "2", "--max_train_steps", "2"],
    ],
)
def test_training_from_disk_equals_the_run_that_rolled_out_itself_without_teacher_or_encoders(
    flags, folder, tmp_path, monkeypatch, extra
):
    trained([*flags, *extra], tmp_path / "own")
    rolled_out([*flags, *extra], folder)
    monkeypatch.setattr(Denoiser, "teacher", refuse)
    monkeypatch.setattr("vflora.models.conditions.load_encoders", refuse)
    trained([*flags, *extra], tmp_path / "disk", "--trajectory_dir", str(folder))
    assert losses(tmp_path / "disk") == losses(tmp_path / "own")
    assert any(float.fromhex(row[0]) > 0 for row in losses(tmp_path / "disk").values())
