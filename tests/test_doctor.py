import logging
import re
import shutil

import pytest
import torch

from vflora.cli import parse
from vflora.doctor import DoctorConfig, Finding, examine, judge_memory, run, verdict
from vflora.models.projection_head import HeadSpec, new_head, save_head
from vflora.models.random_original import write_small_original
from vflora.models.random_weights import small_dinov3_vit


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    pipeline = write_small_original(folder / "original", layers=1)
    pipeline.save_pretrained(folder / "diffusers", max_shard_size="20KB")
    small_dinov3_vit().save_pretrained(folder / "dino")
    save_head(new_head(HeadSpec(16, (8, 4)), torch.Generator().manual_seed(0)), folder / "head.safetensors")
    return folder


@pytest.fixture
def copy(machine, tmp_path):
    shutil.copytree(machine, tmp_path / "copy")
    return tmp_path / "copy"


def _findings(folder, pipeline="diffusers", version="480p_i2v"):
    config = DoctorConfig(
        pipeline_dir=str(folder / pipeline),
        transformer_version=version,
        dino_model_dir=str(folder / "dino"),
        dino_head_path=str(folder / "head.safetensors"),
        output_dir=folder / "runs" / "new",
    )
    return {finding.what.partition(":")[0]: finding for finding in examine(config)}


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [("diffusers", "complete diffusers pipeline"), ("original", "complete in the original layout")],
)
def test_what_is_there_is_found(machine, pipeline, words):
    findings = _findings(machine, pipeline)
    assert findings["model"].level == "ok"
    assert words in findings["model"].what
    for name in ("DINOv3", "identity head", "video"):
        assert findings[name].level == "ok", findings[name].what
    assert "16 features into 4" in findings["identity head"].what


def _remove_shard(folder):
    sorted((folder / "diffusers/transformer").glob("*-of-*.safetensors"))[1].unlink()
    return "diffusers", "is missing"


def _cut_vae(folder):
    file = sorted((folder / "diffusers/vae").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])
    return "diffusers", "cut short"


def _remove_vision(folder):
    shutil.rmtree(folder / "original/vision_encoder")
    return "original", "vision encoder is missing"


def _remove_glyph(folder):
    (folder / "original/text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt").unlink()
    return "original", "glyph encoder is missing"


def _remove_guider(folder):
    (folder / "diffusers" / "guider" / "guider_config.json").unlink()
    return "diffusers", "guider_config.json is missing"


def _remove_all(folder):
    shutil.rmtree(folder / "diffusers")
    return "diffusers", "there is nothing at"


@pytest.mark.parametrize(
    "damage", [_remove_shard, _cut_vae, _remove_vision, _remove_glyph, _remove_guider, _remove_all]
)
def test_what_is_missing_or_damaged_is_named(copy, damage):
    pipeline, words = damage(copy)
    found = _findings(copy, pipeline)["model"]
    assert found.level == "problem"
    assert words in found.what
    assert "download" in found.what


def test_a_version_that_is_not_there_is_named(machine):
    found = _findings(machine, "original", "720p_i2v")["model"]
    assert found.level == "problem"
    assert "480p_i2v but not 720p_i2v" in found.what


def test_a_backbone_of_another_kind_is_named(copy):
    shutil.rmtree(copy / "dino")
    shutil.copytree(copy / "original/vision_encoder/siglip/image_encoder", copy / "dino")
    found = _findings(copy)["DINOv3"]
    assert found.level == "problem"
    assert "not a DINOv3" in found.what


def test_a_hub_name_that_was_never_fetched_is_named():
    found = {f.what.partition(":")[0]: f for f in examine(DoctorConfig(pipeline_dir="nobody/nothing-here"))}["model"]
    assert found.level == "problem"
    assert "not on this machine yet" in found.what


def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    found = {f.what.partition(":")[0]: f for f in examine(DoctorConfig(pipeline_dir="models/nothing-here"))}["model"]
    assert found.level == "problem"
    assert "there is nothing at models/nothing-here" in found.what


@pytest.mark.parametrize(("free", "level"), [(50e9, "ok"), (1e9, "problem")])
def test_a_disk_too_small_for_checkpoints_is_named(tmp_path, monkeypatch, free, level):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    found = next(f for f in examine(DoctorConfig(output_dir=tmp_path / "new")) if f.what.startswith("disk"))
    assert found.level == level


@pytest.mark.parametrize(("free", "level"), [(64, "ok"), (20, "warning")])
def test_main_memory_is_told_with_what_each_work_takes(tmp_path, monkeypatch, free, level):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": free * 2**30}))
    found = next(f for f in examine(DoctorConfig(output_dir=tmp_path)) if f.what.startswith("main memory"))
    assert found.level == level
    assert ("21 with --mode low_memory" in found.what) == (level == "warning")


@pytest.mark.parametrize(
    ("free", "level", "words"),
    [
        (139, "ok", "every mode"),
        (79, "ok", "fits as it is, and with --mode fast --id_decode_downsample_mode area"),
        (40, "warning", "with --id_decode_downsample_mode area, or with --mode low_memory"),
        (23.5, "warning", "fits with --mode low_memory"),
        (
            15.5,
            "warning",
            "fits with --mode low_memory --val_video_length 17; generate and compare with --group_offloading true",
        ),
        (11.3, "warning", "--val_video_length 17 together; generate and compare with --group_offloading true"),
        (11, "warning", "with --mode low_memory --id_decode_downsample_mode area --val_video_length 17 together"),
        (11, "warning", "generate and compare, fewer than 121 frames, with --group_offloading true"),
        (7.5, "problem", "training needs 9.5 GiB free at the least"),
        (7.5, "problem", "generating 121 frames takes 11, with --group_offloading true"),
    ],
)
def test_memory_is_judged_by_measured_needs_and_the_mode_that_fits_is_named(free, level, words):
    found = judge_memory("accelerator: x", free)
    assert found.level == level
    assert words in found.what


def test_every_flag_that_is_advised_exists(train_flags):
    generate_flags = ["--model_path", "x", "--prompt", "x", "--image_path", "x"]
    for free in (139, 79, 57, 40, 23.5, 15.5, 11.3, 11, 7.5):
        training, _, generating = judge_memory("x", free).what.partition("generat")
        for words in re.findall(r"--[a-z_]+ \w+", training):
            parse("train", [*train_flags, *words.split()])
        for words in re.findall(r"--[a-z_]+ \w+", generating):
            parse("generate", [*generate_flags, *words.split()])


def test_a_machine_that_was_not_looked_at_whole_is_not_said_to_train(machine):
    *_, unseen = examine(DoctorConfig(output_dir=machine))
    fine, problem = Finding("warning", "memory: little"), Finding("problem", "disk: full")
    assert verdict([fine]) == "this machine can train"
    assert verdict([fine, unseen]) == "nothing found that would stop a run, but not everything was looked at"
    assert verdict([fine, unseen, problem]).startswith("fix what says PROBLEM (1)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a machine without an accelerator")
def test_problems_give_a_failing_exit_code(machine, caplog):
    caplog.set_level(logging.INFO)
    assert run(DoctorConfig(output_dir=machine)) == 1
    assert "PROBLEM  accelerator: no GPU that PyTorch can use, and on the CPU only small models train" in caplog.text
    assert ("built without CUDA" if torch.version.cuda is None else "finds no GPU") in caplog.text
    assert "not looked at; give --pipeline_dir to have it checked" in caplog.text
    assert "fix what says PROBLEM (1) before you train" in caplog.text
