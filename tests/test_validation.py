import logging
from dataclasses import replace

import pytest
import torch

from vflora.cli import parse
from vflora.demo import world_folder
from vflora.training_setup import set_up
from vflora.validation import FROZEN_RATIO

NUMBERS = ("cosine_mean", "cosine_std", "cosine_last_quarter", "motion")


@pytest.fixture
def training(train_flags):
    """With the world's base model, whose clips of a plain picture are calm."""
    validation = ["--enable_validation", "--val_num_samples", "1", "--val_video_length", "5"]
    flags = [*train_flags, *validation, "--pipeline_dir", str(world_folder()), "--num_inference_steps", "3"]
    training = set_up(parse("train", flags))
    plain = [replace(b, images=torch.full_like(b.images, 128)) for b in training.validation_batches]
    return replace(training, validation_batches=plain)


@torch.no_grad()
def bend(training):
    """Bends the base away from itself and lets the LoRA bend it back: the teacher flickers, the student is calm."""
    layer = training.denoiser.transformer.norm_out.linear
    down, up = (factor["student"].weight for factor in (layer.lora_A, layer.lora_B))
    up.normal_(0, 30, generator=torch.Generator().manual_seed(0))
    layer.base_layer.weight -= up @ down


def test_a_student_that_moves_less_than_half_as_much_is_called_frozen_with_what_to_do(training, caplog):
    bend(training)
    with caplog.at_level(logging.WARNING, logger="vflora.validation"):
        metrics = training.validator.run(training.validation_batches, None)
    ratio = metrics["val/motion_ratio"]
    assert ratio == metrics["val/student_motion"] / metrics["val/teacher_motion"]
    assert 0 < ratio < FROZEN_RATIO
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"the student moves {100 * ratio:.0f} % as much as the teacher: lower --lambda_id")


def test_without_a_lora_student_and_teacher_score_alike_and_nobody_is_warned(training, caplog):
    with caplog.at_level(logging.WARNING, logger="vflora.validation"):
        metrics = training.validator.run(training.validation_batches, None)
    assert metrics["val/teacher_deviation"] == 0.0
    assert metrics["val/motion_ratio"] == 1.0
    assert [metrics[f"val/student_{n}"] for n in NUMBERS] == [metrics[f"val/teacher_{n}"] for n in NUMBERS]
    assert not caplog.records
