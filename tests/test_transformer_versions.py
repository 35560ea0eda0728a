"""Every published image-to-video transformer, in one folder of the original layout, as its users have them."""

import json

import pytest
import torch
from PIL import Image

from vflora.cli import main, parse
from vflora.doctor import DoctorConfig, examine
from vflora.download import DownloadConfig, all_parts
from vflora.generate_config import GenerateConfig
from vflora.inference import load_for_sampling
from vflora.models.loading import load_guidance_scale
from vflora.models.random_original import write_small_original
from vflora.sampling import default_steps
from vflora.train import run as train
from vflora.video_io import read_mp4

# name: (time shift, guidance, steps, trained size)
VERSIONS = {
    "480p_i2v": (5.0, 6.0, 50, 640),
    "480p_i2v_distilled": (5.0, 1.0, 50, 640),
    "480p_i2v_step_distilled": (7.0, 1.0, 8, 640),
    "720p_i2v": (7.0, 6.0, 50, 960),
    "720p_i2v_distilled": (7.0, 1.0, 50, 960),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """One folder with all transformers in it, and the same models as diffusers made them."""
    root = tmp_path_factory.mktemp("published")
    made = {}
    for seed, version in enumerate(VERSIONS):
        place = root / ("all" if seed == 0 else version)
        made[version] = write_small_original(
            place, version, layers=1, seed=seed, use_meanflow="step_distilled" in version
        )
        if seed:
            (place / "transformer" / version).rename(root / "all" / "transformer" / version)
    return root / "all", made


@pytest.mark.parametrize("version", VERSIONS)
def test_each_is_loaded_with_its_own_weights_schedule_guidance_and_size(published, version):
    folder, made = published
    pipeline = load_for_sampling(str(folder), version, "fp32", "cpu")
    expected = made[version].transformer.state_dict()
    loaded = pipeline.transformer.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    shift, guidance, steps, size = VERSIONS[version]
    assert pipeline.scheduler.config.shift == shift
    assert pipeline.guider.guidance_scale == load_guidance_scale(str(folder), version) == guidance
    assert default_steps(pipeline) == steps
    assert pipeline.target_size == size


@pytest.mark.parametrize("version", VERSIONS)
def test_doctor_finds_each_and_download_names_its_files(published, version):
    folder, _ = published
    found = {f.what.partition(":")[0]: f for f in examine(DoctorConfig(str(folder), version))}["model"]
    assert found.level == "ok"
    assert version in found.what
    part = all_parts(DownloadConfig(layout="original", transformer_version=version))[0]
    assert f"transformer/{version}/*" in part.patterns
    assert all_parts(DownloadConfig(transformer_version=version))[0].source.endswith(f"Diffusers-{version}")


@pytest.mark.parametrize("version", VERSIONS)
def test_each_trains(published, train_flags, tmp_path, version):
    flags = ["--pipeline_dir", str(published[0]), "--transformer_version", version, "--max_train_steps", "2"]
    train(parse("train", [*train_flags, *flags]))
    first, second = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["loss/distill"] == 0.0
    assert second["loss/distill"] > 0.0


def test_the_step_distilled_one_generates_with_its_few_steps(published, tmp_path):
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "picture.png")
    folder = published[0]
    convert = ["convert", str(folder), str(tmp_path / "model"), "--transformer_version", "480p_i2v_step_distilled"]
    assert main([*convert, "--dtype", "fp32"]) == 0
    config = tmp_path / "model/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_size": 64}))  # small pictures, for speed
    command = ["generate", "--model_path", str(tmp_path / "model"), "--image_path", str(tmp_path / "picture.png")]
    command += ["--prompt", "a cat waves", "--enable_step_distill", "--video_length", "5"]
    command += ["--dtype", "fp32", "--device", "cpu", "--output_path", str(tmp_path / "video.mp4")]
    assert main(command) == 0
    facts = json.loads((tmp_path / "video.json").read_text())
    assert (facts["steps_taken"], facts["guidance_used"]) == (8, 1.0)
    assert read_mp4(tmp_path / "video.mp4")[0].shape == (5, 64, 64, 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_flags_of_generate_lead_to_each(version):
    flags = {
        "resolution": version[:4],
        "cfg_distilled": version.endswith("i2v_distilled"),
        "enable_step_distill": "step" in version,
    }
    assert GenerateConfig(prompt="a", model_path="b", image_path="c.png", **flags).version == version
