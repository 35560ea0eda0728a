import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

from vflora import cli
from vflora.cli import COMMANDS, build_parser, config_class_of, config_groups, main, parse

FROZEN = Path(__file__).parent / "flags.json"
REFERENCE = {
    "train": {
        "transformer_version": "480p_i2v", "wds_shuffle_buf": 128, "batch_size": 1, "num_workers": 4,
        "p_secondary": 0.1, "secondary_cache_max_size": 128, "enable_augmentation": False,
        "augment_r": 0.92, "augment_j": 0.04,
        "train_target_resolution": "480p", "train_video_length": 17, "num_inference_steps": 25, "harvest_count": 2,
        "harvest_scheme": "bracket", "harvest_jitter_frac": 0.05, "id_timestep_frac_low": 0.6,
        "id_timestep_frac_high": 0.85, "id_num_frames": 5, "lambda_id": 0.6, "lambda_id_schedule": "constant",
        "lambda_id_warmup_steps": 500, "id_every_steps": 1, "id_decode_downsample_mode": "false",
        "id_decode_scale": 0.5, "learning_rate": 1e-4, "weight_decay": 0.01, "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0, "use_muon": True, "max_train_steps": 10000, "warmup_steps": 500, "use_lora": True,
        "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": None,
        "pretrained_lora_path": None, "save_every_steps": 1000, "log_every_steps": 10, "dtype": "bf16", "seed": 42,
        "enable_validation": False, "val_every_steps": 1000, "val_num_samples": 4, "enable_fsdp": True,
        "resume_from_checkpoint": None,
        # Said otherwise on purpose: one process by default, and a length of the form 4n+1.
        "sp_size": 1, "val_video_length": 61,
    },
    "train-head": {
        "shuffle_buffer": 4096, "pk_identities": 16, "pk_instances": 4, "max_per_identity": 16, "total_steps": 10000,
        "grad_accum": 1, "learning_rate": 5e-4, "weight_decay": 0.01, "warmup_ratio": 0.05, "temperature": 0.1,
        "dropout": 0.1, "activation": "gelu", "use_layernorm": True, "proj_dims": [512, 256], "val_batches": 4,
        "val_every": 1000, "log_every": 25, "save_every": 500, "seed": 1337, "model_dtype": "bf16",
        "crop_ratio": 0.9, "crop_jitter": 0.06,
    },
    "generate": {
        "negative_prompt": "", "aspect_ratio": "16:9", "num_inference_steps": None, "guidance_scale": None,
        "video_length": 121, "num_frames": None, "offloading": True, "group_offloading": None, "dtype": "bf16",
        "seed": 123, "fps": 24, "enable_torch_compile": False, "enable_cache": False, "cache_start_step": 11,
        "cache_end_step": 45, "total_steps": 50, "cache_step_interval": 4, "save_generation_config": True,
    },
}  # fmt: skip


def defaults(command):
    values = {}
    for group in config_groups(config_class_of(command)):
        for field in fields(group):
            default = field.default if field.default is not MISSING else None
            if field.default_factory is not MISSING:
                default = field.default_factory()
            values[field.name] = default
    return values


@pytest.mark.parametrize("command", REFERENCE)
def test_flags_of_the_reference_exist_with_their_defaults(command):
    ours = defaults(command)
    assert {name: ours[name] for name in REFERENCE[command]} == REFERENCE[command]


def test_help_and_refusals_of_everyday_commands_do_not_wait_for_diffusers():
    everyday = ["data pack", "data check", "train-head", "train", "encode", "rollouts", "generate", "compare", "watch"]
    code = f"import sys; from vflora.cli import config_class_of; [config_class_of(name) for name in {everyday}]; "
    code += "print({'diffusers', 'transformers', 'peft'} & sys.modules.keys())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"


def test_no_flag_appears_disappears_or_changes_its_default_unnoticed():
    # After a change on purpose: write `found` to flags.json, and say so in the changelog.
    found = {command: {name: str(value) for name, value in defaults(command).items()} for command in sorted(COMMANDS)}
    assert found == json.loads(FROZEN.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_a_sentence_for_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    groups = config_groups(config_class_of(command))
    for name in (name for group in groups for name in get_type_hints(group)):
        assert f"--{name}" in shown
    parser = build_parser(command, groups)
    undocumented = [a.dest for a in parser._actions if not a.help]
    assert undocumented == []


def test_a_yaml_file_sets_flags_and_the_command_line_wins(train_flags, tmp_path):
    (tmp_path / "run.yaml").write_text("harvest_count: 1\nid_num_frames: 3\n")
    settings = parse("train", ["--config", str(tmp_path / "run.yaml"), *train_flags, "--id-num-frames", "4"])
    assert settings.rollout.harvest_count == 1
    assert settings.identity.id_num_frames == 4


def test_the_saved_settings_are_a_config_file(train_flags, tmp_path):
    settings = parse("train", train_flags)
    (tmp_path / "saved.yaml").write_text(settings.yaml())
    assert parse("train", ["--config", str(tmp_path / "saved.yaml")]) == settings


@pytest.mark.parametrize(("words", "code"), [(["world", "--help"], 0), (["world"], 2), (["world", "nothing"], 2)])
def test_a_family_of_commands_lists_its_own(capsys, words, code):
    assert main(words) == code
    shown, complaint = capsys.readouterr()
    assert "vflora world COMMAND --help" in shown
    assert "world ablate" in shown
    assert "train-head" not in shown
    assert ("no command 'world nothing'" in complaint) == ("nothing" in words)


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "--help"]], ids=" ".join)
def test_help_whose_reader_has_left_ends_without_a_complaint(words):
    command = [sys.executable, "-m", "vflora.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head` does, before anything was written
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")


def test_overview_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_a_disk_that_fills_up_is_told_in_one_line(train_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.tmp").symlink_to("/dev/full")
    assert main(["train", *train_flags]) == 2
    error = capsys.readouterr().err
    assert "is full: make room and run the command again" in error
    assert "Traceback" not in error


def test_a_gpu_that_fills_up_is_told_with_the_flags_that_save_memory(train_flags, capsys, monkeypatch):
    def fill(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8")

    monkeypatch.setattr("vflora.train.learn", fill)
    assert main(["train", *train_flags]) == 2
    error = capsys.readouterr().err
    assert "vflora: CUDA out of memory. Tried to allocate 2.00 GiB: use --mode low_memory, --id_decode" in error
    assert "Traceback" not in error


def test_what_is_advised_to_a_gpu_that_fills_up_are_flags_of_the_command():
    for command, advice in cli._LESS_MEMORY.items():
        flags = set(re.findall(r"--(\w+)", advice))
        assert flags
        assert flags <= defaults(command).keys()


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch extends memory on Linux alone")
@pytest.mark.parametrize(
    ("command", "own", "expected"),
    [
        ("generate --model_path x --prompt x", {}, "expandable_segments:True"),
        ("generate --model_path x --prompt x", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, None),
        (
            "compare --pipeline_dir x --lora_path x --images x --output_dir x",
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            "max_split_size_mb:512",
        ),
        ("export --checkpoint_path x --output_dir x", {}, None),
    ],
)
def test_sampling_lets_memory_grow_unless_the_user_has_other_ideas(command, own, expected, monkeypatch, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_ALLOC_CONF")}
    monkeypatch.setattr(os, "environ", kept | own)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2  # nothing of that is there
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


def test_the_flags_that_save_memory_exist(train_flags):
    generate = ["--model_path", "x", "--prompt", "x", "--image_path", "x"]
    compare = ["--pipeline_dir", "x", "--lora_path", "x", "--images", "x", "--output_dir", "x"]
    less = ["--group_offloading", "true", "--video_length", "17"]
    parse("generate", [*generate, *less])
    parse("compare", [*compare, *less])
    flags = ["--mode", "low_memory", "--id_decode_downsample_mode", "area", "--val_video_length", "17"]
    parse("train", [*train_flags, *flags, "--train_target_resolution", "32x32", "--train_video_length", "5"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian", "--lora_r", "4"], "there is no command 'trian': write `vflora train`."),
        (["data", "pak", "pictures"], "there is no command 'data pak': write `vflora data pack`."),
        (["--lora_r", "4"], "there is no command '4': choose one of these."),
        (["xyz"], "there is no command 'xyz': choose one of these."),
    ],
)
def test_an_unknown_command_is_told_with_code_2(capsys, words, sentence):
    assert main(words) == 2
    assert capsys.readouterr().err == f"vflora: {sentence}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--lr", "1e-4"], "there is no --lr: write --learning_rate"),
        (["train", "--network-dim=8"], "there is no --network_dim: write --lora_r"),
        (["generate", "--lora_strength", "1"], "there is no --lora_strength: write --lora_scale"),
        (["train", "--max_train_step", "4"], "there is no --max_train_step: write --max_train_steps"),
        (["export"], "required and not given: --checkpoint_path, --output_dir"),
    ],
)
def test_a_flag_that_is_not_there_is_told_with_the_one_that_is(capsys, words, sentence):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("enable_validation", "maybe", "--enable_validation maybe does not fit: it takes true or false"),
        ("batch_size", "many", "--batch_size many does not fit: it takes a whole number"),
        ("learning_rate", "nan", "--learning_rate nan does not fit: it takes a number"),
        ("harvest_scheme", "all", "--harvest_scheme all does not fit: it takes bracket, random"),
        ("keep_checkpoints", "few", "--keep_checkpoints few does not fit: it takes a whole number or null"),
        ("lora_target_modules", "[a", "--lora_target_modules [a does not fit: it takes a list (text each) or null"),
    ],
)
def test_a_value_of_another_kind_gets_one_line_that_says_what_fits(train_flags, capsys, flag, value, sentence):
    assert main(["train", *train_flags, f"--{flag}", value]) == 2
    assert capsys.readouterr().err == f"vflora: {sentence} (`vflora train --help` lists the flags).\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lora-r: 4", "lora-r in the --config file is no setting: write lora_r ("),
        ("lora_rank: 4", "lora_rank in the --config file is no setting: write lora_r ("),
        ("lora:\n  lora_r: 4", "lora.lora_r in the --config file is no setting: write lora_r at the left margin ("),
        ("xyzzy: 4", "xyzzy in the --config file is no setting: remove it ("),
    ],
)
def test_a_key_of_a_config_file_that_is_no_flag_is_told_with_the_right_one(
    train_flags, tmp_path, capsys, content, sentence
):
    (tmp_path / "run.yaml").write_text(content)
    assert main(["train", *train_flags, "--config", str(tmp_path / "run.yaml")]) == 2
    assert sentence in capsys.readouterr().err


def test_a_broken_config_file_is_told_in_one_line(train_flags, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("lora_r: [\n")
    assert main(["train", *train_flags, "--config", str(tmp_path / "broken.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
