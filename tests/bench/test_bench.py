"""The measurements run at small size and say what they should."""

import json

import pytest
import yaml

from vflora.bench import accuracy, ratio, step
from vflora.bench.accuracy import AccuracyConfig, BenchAccuracySettings
from vflora.bench.ratio import BenchRatioConfig
from vflora.bench.setting import BenchConfig, build_setting
from vflora.bench.step import BenchStepSettings
from vflora.errors import UserError
from vflora.models.speed_config import SpeedConfig
from vflora.step_clock import StepClock

SMALL = {"size": "small", "resolution": "32x32", "frames": 5, "dtype": "fp32", "device": "cpu"}


@pytest.mark.parametrize("mode", ["exact", "low_memory"])
def test_a_step_is_timed_part_by_part(tmp_path, mode):
    output = tmp_path / "step.json"
    config = BenchConfig(**SMALL, steps=1, output=output)
    step.run(BenchStepSettings(config, SpeedConfig.preset(mode)))
    result = json.loads(output.read_text())
    assert set(result["parts_s"]) >= {"data", "rollout", "distillation", "identity", "optimizer"}
    assert 0 < sum(v for k, v in result["parts_s"].items() if k != "step") <= result["parts_s"]["step"]
    assert result["speed"]["weight_storage"] == ("int8" if mode == "low_memory" else "full")


def test_shared_rollouts_are_spread_over_their_steps(tmp_path):
    output = tmp_path / "step.json"
    config = BenchConfig(**SMALL, steps=3, trajectory_reuse=3, output=output)
    step.run(BenchStepSettings(config, SpeedConfig()))
    result = json.loads(output.read_text())
    assert len(result["steps_s"]) == 3
    assert result["step_s"] == pytest.approx(sum(result["steps_s"]) / 3)


def test_every_approximation_is_close_and_the_exact_ones_are_exact(tmp_path):
    output = tmp_path / "accuracy.json"
    accuracy.run(BenchAccuracySettings(AccuracyConfig(), BenchConfig(**SMALL, output=output)))
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    tiles = rows["decoder in tiles (rounding)"]
    assert tiles["velocity_error"] == tiles["state_error"] == 0
    assert tiles["gradient_error"] < 1e-4
    assert tiles["distillation_gradient_error"] == 0 <= tiles["identity_gradient_error"] < 1e-4
    assert 0 < rows["fp8 rollouts"]["velocity_error"] < 0.1
    assert rows["every second rollout point"]["velocity_error"] == 0
    assert 0 < rows["every second rollout point"]["state_error"] < 0.1
    assert 0 < rows["int8 weights"]["velocity_error"] < rows["fp8 weights"]["velocity_error"] < 0.1
    assert all(row["gradient_cosine"] > 0.99 for name, row in rows.items() if "half-size" not in name)


def test_the_step_of_a_training_is_measured_on_its_own_models_and_leaves_its_folder_alone(tmp_path, trained_run):
    settings = yaml.safe_load(next(trained_run.glob("checkpoint-*/config.yaml")).read_text())
    recorded = tmp_path / "guided.yaml"
    recorded.write_text(
        yaml.safe_dump(settings | {"rollout_guidance_scale": 3.0, "rollout_stride": 2, "lambda_id_schedule": "linear"})
    )
    before = sorted(trained_run.rglob("*"))
    output = tmp_path / "accuracy.json"
    accuracy.run(BenchAccuracySettings(AccuracyConfig(recorded), BenchConfig(**SMALL, output=output)))
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert found["bench"] == {"train_config": str(recorded)}
    tiles = rows["decoder in tiles (rounding)"]
    assert tiles["state_error"] == 0
    # where lambda grows from 0, what is measured is the step of a training that is past that
    assert tiles["distillation_gradient_error"] == 0 < tiles["identity_gradient_cosine"]
    assert 0 < rows["every second rollout point"]["state_error"] < 0.1
    assert sorted(trained_run.rglob("*")) == before


def test_a_smaller_card_is_not_passed_over_with_a_trainings_own_models(trained_run):
    config = BenchConfig(**SMALL | {"device": "cpu", "card_gib": 16})
    with pytest.raises(UserError, match="--card_gib 16 limits a CUDA GPU's memory"):
        accuracy.run(BenchAccuracySettings(AccuracyConfig(trained_run / "checkpoint-4" / "config.yaml"), config))


def test_a_training_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no file: name the config.yaml of a checkpoint"):
        accuracy.run(BenchAccuracySettings(AccuracyConfig(tmp_path / "no.yaml"), BenchConfig(**SMALL)))


def test_the_ratios_are_written_and_a_second_copy_holds_the_weights_twice(tmp_path):
    # Times are printed and kept, never asserted: the machine may be busy.
    output = tmp_path / "new folder" / "ratio.json"
    ratios = ratio.run(BenchRatioConfig(repeats=1, output=output))
    assert json.loads(output.read_text()) == ratios
    assert all(0 < value < float("inf") for value in ratios.values())
    assert 1.8 < ratios["weights, second copy / adapters off"] < 2


@pytest.mark.parametrize(("spread", "lengths"), [(0, {20}), (2, {18, 19, 20, 21, 22})])
def test_prompts_have_the_length_asked_for(spread, lengths):
    config = BenchConfig(**SMALL, prompt_tokens=20, prompt_spread=spread)
    setting = build_setting(config, SpeedConfig())
    clock = StepClock(setting.device)
    found = {setting.source.lessons(step, clock)[0].conditions.prompt_lengths[0] for step in range(1 + 9 * spread)}
    assert found <= lengths
    assert (len(found) > 1) == (spread > 0)
