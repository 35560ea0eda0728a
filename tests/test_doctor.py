import logging
import shutil

import pytest
import torch

from vflora.doctor import DoctorConfig, examine, judge_memory, run
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


def _remove_all(folder):
    shutil.rmtree(folder / "diffusers")
    return "diffusers", "there is nothing at"


@pytest.mark.parametrize("damage", [_remove_shard, _cut_vae, _remove_vision, _remove_glyph, _remove_all])
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


@pytest.mark.parametrize(("free", "level"), [(50e9, "ok"), (1e9, "problem")])
def test_a_disk_too_small_for_checkpoints_is_named(tmp_path, monkeypatch, free, level):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    found = next(f for f in examine(DoctorConfig(output_dir=tmp_path / "new")) if f.what.startswith("disk"))
    assert found.level == level


@pytest.mark.parametrize(("free", "level"), [(80, "ok"), (40, "warning"), (24, "problem"), (8, "problem")])
def test_memory_is_judged_by_measured_needs(free, level):
    assert judge_memory("accelerator: x", free).level == level


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a machine without an accelerator")
def test_problems_give_a_failing_exit_code(machine, caplog):
    caplog.set_level(logging.INFO)
    assert run(DoctorConfig(output_dir=machine)) == 1
    assert "PROBLEM  accelerator" in caplog.text
    assert "not looked at; give --pipeline_dir" in caplog.text
