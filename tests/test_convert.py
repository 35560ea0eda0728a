import pytest
import torch
from diffusers import HunyuanVideo15ImageToVideoPipeline
from safetensors.torch import load_file

from vflora.convert import ConvertConfig, run
from vflora.errors import UserError
from vflora.models.random_original import write_small_original


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, write_small_original(folder, layers=1)


def test_the_written_folder_is_a_diffusers_pipeline_with_the_same_weights(original, tmp_path):
    folder, pipeline = original
    run(ConvertConfig(folder, tmp_path / "diffusers", dtype="fp32"))
    loaded = HunyuanVideo15ImageToVideoPipeline.from_pretrained(tmp_path / "diffusers")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (loaded, pipeline))
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert torch.equal(ours[key], value), f"{name}.{key}"
    assert loaded.scheduler.config.shift == 5.0
    assert loaded.guider.guidance_scale == 6.0
    text = 'says "hi"'
    assert loaded.tokenizer(text).input_ids == pipeline.tokenizer(text).input_ids
    assert loaded.tokenizer_2(text).input_ids == pipeline.tokenizer_2(text).input_ids
    assert not list(tmp_path.glob(".*"))


def test_the_transformer_is_written_in_the_precision_asked_for(original, tmp_path):
    run(ConvertConfig(original[0], tmp_path / "a"))
    transformer = load_file(tmp_path / "a/transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in transformer.values()} == {torch.bfloat16}
    vae = load_file(tmp_path / "a/vae/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in vae.values()} == {torch.float32}


def test_a_folder_that_needs_no_conversion_or_would_be_overwritten_is_refused(original, tmp_path):
    with pytest.raises(UserError, match="not in the original layout"):
        run(ConvertConfig(tmp_path, tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="not empty"):
        run(ConvertConfig(original[0], tmp_path / "full"))


def test_a_disk_without_room_is_noticed_before_writing(original, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="free some space"):
        run(ConvertConfig(original[0], tmp_path / "out"))
    assert not (tmp_path / "out").exists()
