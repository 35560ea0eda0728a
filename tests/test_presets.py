"""`--mode`: what it stands for, and what wins over it."""

from dataclasses import replace

import pytest
import yaml

from vflora.cli import parse
from vflora.errors import UserError
from vflora.models.speed_config import SpeedConfig
from vflora.train import run

BENCH = ["--size", "small"]


def speed(*arguments):
    return parse("bench step", [*BENCH, *arguments]).speed


@pytest.mark.parametrize("mode", ["exact", "fast", "low_memory"])
def test_train_and_bench_read_a_mode_alike(mode, train_flags):
    assert parse("train", [*train_flags, "--mode", mode]).speed == speed(f"--mode={mode}") == SpeedConfig.preset(mode)


def test_without_a_mode_every_flag_is_exact():
    assert speed() == SpeedConfig() == SpeedConfig.preset("exact")


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--rollout_precision", "full"], {"rollout_precision": "full"}),
        (["--no-compile", "--attention-backend", "native"], {"compile": False, "attention_backend": "native"}),
        (["--id_decode_recompute"], {"id_decode_recompute": True}),
        (["--id_decode_tile", "64"], {"id_decode_tile": 64}),
    ],
)
@pytest.mark.parametrize("mode_last", [False, True])
def test_a_flag_that_is_given_wins_over_the_mode_also_where_it_names_the_default(flags, changed, mode_last):
    mode = ["--mode", "fast"]
    got = speed(*flags, *mode) if mode_last else speed(*mode, *flags)
    assert got == replace(SpeedConfig.preset("fast"), **changed) == SpeedConfig.preset("fast", **changed)


def test_a_flag_may_take_away_a_number_that_the_mode_sets():
    assert speed("--mode", "low_memory", "--id_decode_tile", "null").id_decode_tile is None


def test_a_config_file_sets_mode_and_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("mode: low_memory\nid_decode_tile: 64\n")
    config = ["--config", str(file)]
    assert speed(*config) == SpeedConfig.preset("low_memory", id_decode_tile=64)
    assert speed(*config, "--id_decode_tile", "32") == SpeedConfig.preset("low_memory", id_decode_tile=32)
    assert speed(*config, "--mode", "fast") == SpeedConfig.preset("fast", id_decode_tile=64)


def test_saved_settings_can_be_run_in_another_mode_and_keep_what_was_given(train_flags, tmp_path):
    flags = ["--block_offload", "false", "--enable_gradient_checkpointing", "false"]
    settings = parse("train", [*train_flags, "--mode", "low_memory", *flags])
    saved = tmp_path / "saved.yaml"
    saved.write_text(settings.yaml())
    assert parse("train", ["--config", str(saved)]) == settings
    other = parse("train", ["--config", str(saved), "--mode", "fast"])
    assert other == replace(settings, speed=SpeedConfig.preset("fast", enable_gradient_checkpointing="false"))


REQUIRED = ["--pipeline_dir", "models", "--wds_root", "data", "--metadata_key", "name"]
REQUIRED += ["--dino_model_dir", "dino", "--dino_head_path", "head"]
LEVELS, PLACES = ["--id_sigma_low", "0.2"], ["--id_timestep_frac_low", "0.6"]


@pytest.mark.parametrize(
    ("typed", "saved", "band"),
    [
        ([], {}, (0.15, 0.45)),
        (PLACES, {}, (None, None)),
        (["--id_timestep_frac_high=0.9"], {}, (None, None)),
        ([*PLACES, *LEVELS], {}, (0.2, 0.45)),
        ([], {"id_timestep_frac_low": 0.6}, (None, None)),
        ([], {"id_timestep_frac_low": 0.6, "id_sigma_low": 0.15, "id_sigma_high": 0.45}, (0.15, 0.45)),
        (PLACES, {"id_timestep_frac_low": 0.5, "id_sigma_low": 0.15, "id_sigma_high": 0.45}, (None, None)),
        (LEVELS, {"id_timestep_frac_low": 0.6}, (0.2, 0.45)),
    ],
)
def test_a_place_for_the_deep_point_sets_its_noise_levels_aside_where_none_are_given(typed, saved, band, tmp_path):
    file = tmp_path / "saved.yaml"
    file.write_text(yaml.safe_dump(saved))
    got = parse("train", ["--config", str(file), *REQUIRED, *typed]).rollout
    assert (got.id_sigma_low, got.id_sigma_high) == band


@pytest.mark.parametrize("config", ["id_timestep_frac_low: 0.5", '{"id_timestep_frac_low": 0.5}'])
def test_settings_written_where_a_file_could_be_named_count_as_given(config):
    got = parse("train", [*REQUIRED, "--config", config]).rollout
    assert (got.id_timestep_frac_low, got.id_sigma_low, got.id_sigma_high) == (0.5, None, None)


def test_flags_win_over_a_config_file_that_is_named_after_them(tmp_path):
    file = tmp_path / "saved.yaml"
    file.write_text("seed: 1\nlora_r: 8\n")
    settings = parse("train", [*REQUIRED, "--seed", "7", "--config", str(file), "--id_margin=0.1"])
    assert (settings.run.seed, settings.lora.lora_r, settings.identity.id_margin) == (7, 8, 0.1)


def test_a_flag_that_is_not_written_whole_is_refused():
    with pytest.raises(UserError, match="id_timestep_frac_hi"):
        parse("train", [*REQUIRED, "--id_timestep_frac_hi", "0.9"])


def test_an_unknown_mode_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="exact.*fast.*low_memory"):
        speed("--mode", "quick")
    with pytest.raises(UserError, match="use exact, fast, low_memory"):
        SpeedConfig.preset("quick")


def test_a_mode_none_of_whose_flags_are_left_is_called_exact():
    with pytest.raises(UserError, match="is --mode exact"):
        SpeedConfig(mode="fast")


def test_a_run_keeps_the_resolved_flags_and_resumes_in_any_mode_that_learns_the_same(train_flags, tmp_path):
    flags = [*train_flags, "--mode", "low_memory", "--id_decode_tile", "32", "--weight_storage", "full"]
    run(parse("train", [*flags, "--max_train_steps", "1", "--learning_rate", "1e-3"]))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    wanted = {"mode": "low_memory", "id_decode_tile": 32, "weight_storage": "full"}
    assert {name: saved[name] for name in wanted} == wanted
    assert saved["enable_gradient_checkpointing"] == "true"
    again = [*train_flags, "--max_train_steps", "2", "--learning_rate", "1e-3", "--resume_from_checkpoint", "latest"]
    assert run(parse("train", again)).name == "checkpoint-2"
    with pytest.raises(UserError, match="--weight_storage was full and is int8"):
        run(parse("train", [*again, "--max_train_steps", "3", "--mode", "low_memory"]))
