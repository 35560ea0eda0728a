"""Whole training runs as several processes: same losses, shared validation."""

import json
from functools import partial

import pytest

from vflora.cli import parse
from vflora.train import run


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder, *names):
    names = names or ("loss/total", "loss/distill", "loss/identity", "gradient_norm")
    return {row["step"]: [row[name] for name in names] for row in read(folder) if "loss/distill" in row}


@pytest.fixture
def flags(train_flags):
    # A learning rate at which the student leaves the teacher visibly: near it, their difference is all rounding.
    return [
        *train_flags,
        "--train_video_length",
        "5",
        "--learning_rate",
        "3e-2",
        "--use_muon",
        "false",
        "--condition_lookahead",
        "1",
    ]


@pytest.fixture
def train(launch, flags):
    """Trains with so many processes, which share the global batch of four."""

    def start(output_dir, processes, *extra, sp_size=1):
        batch = 4 * sp_size // processes
        mine = [*flags, "--batch_size", str(batch), "--sp_size", str(sp_size), "--output_dir", str(output_dir), *extra]
        return launch(processes, partial(run, parse("train", mine)))

    return start


@pytest.fixture(scope="module")
def alone(small_models, small_data, tmp_path_factory):
    """Where the losses of a single process are kept once they are known."""
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.mark.parametrize(("processes", "sp_size"), [(2, 1), (2, 2), (4, 2)])
def test_same_losses_as_one_process_on_the_same_global_batch(train, alone, tmp_path, processes, sp_size):
    if not alone.exists():
        train(alone, 1)
    train(tmp_path / "several", processes, sp_size=sp_size)
    wanted, found = losses(alone), losses(tmp_path / "several")
    assert list(found) == list(wanted) == [1, 2, 3, 4]
    for step in wanted:
        assert found[step] == pytest.approx(wanted[step], rel=1e-5), step
    assert wanted[1][1] == found[1][1] == 0.0, "the student starts as the teacher, sharded or not"


def test_guided_rollouts_give_the_same_losses_too(train, tmp_path):
    # Extrapolated over skipped points and multiplied by the guidance, the rounding of the last digits counts more.
    extra = ["--rollout_guidance_scale", "3", "--max_train_steps", "3"]
    for name, processes, sp_size in (("alone", 1, 1), ("data", 2, 1), ("sequence", 2, 2)):
        train(tmp_path / name, processes, *extra, sp_size=sp_size)
    wanted = losses(tmp_path / "alone")
    for name in ("data", "sequence"):
        found = losses(tmp_path / name)
        assert list(found) == [1, 2, 3]
        for step in wanted:
            assert found[step] == pytest.approx(wanted[step], rel=1e-4), (name, step)


@pytest.mark.parametrize(("processes", "sp_size"), [(4, 2), (4, 1)])
def test_validation_is_shared_and_the_same_for_any_number_of_processes(train, tmp_path, processes, sp_size):
    """Three samples: some processes have none left in the last round and must not hang the others."""
    extra = ["--enable_validation", "--val_num_samples", "3", "--val_video_length", "5", "--max_train_steps", "1"]
    train(tmp_path / "one", 1, *extra)
    train(tmp_path / "several", processes, *extra, sp_size=sp_size)
    one, several = (
        {name: value for row in read(tmp_path / d) for name, value in row.items() if name.startswith("val/")}
        for d in ("one", "several")
    )
    assert len(one) > 5
    assert several == pytest.approx(one, rel=1e-3)
    previews = [
        sorted(p.name for p in (tmp_path / d / "previews" / "step-000001").iterdir()) for d in ("one", "several")
    ]
    assert previews[0] == previews[1]
    assert len(previews[0]) == 3


def test_muon_sees_the_same_gradients_up_to_the_rounding_of_its_bf16_iteration(train, tmp_path):
    muon = ["--use_muon", "true", "--learning_rate", "1e-3", "--max_train_steps", "3"]
    train(tmp_path / "one", 1, *muon)
    train(tmp_path / "two", 2, *muon)
    wanted, found = (losses(tmp_path / d, "loss/total", "loss/identity") for d in ("one", "two"))
    for step in (1, 2, 3):
        assert found[step] == pytest.approx(wanted[step], rel=1e-5), step
