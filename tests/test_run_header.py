import base64
import hashlib
import io
import json

import pytest
from PIL import Image
from safetensors import safe_open

from vflora.cli import main
from vflora.models.lora_formats import FORMATS
from vflora.run_header import base_model_name, shareable


def header_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, trained_run, tmp_path_factory):
    """The adapter of a real run, exported with no flag but the format."""
    folder = tmp_path_factory.mktemp(request.param)
    command = ["export", "--checkpoint_path", str(trained_run / "checkpoint-4"), "--output_dir", str(folder)]
    assert main([*command, "--format", request.param]) == 0
    return next(folder.glob("*.safetensors"))


def test_the_header_has_the_model_the_recipe_rank_alpha_characters_and_the_modelspec_fields(exported):
    header = header_of(exported)
    assert header["modelspec.sai_model_spec"] == "1.0.0"
    assert header["modelspec.architecture"] == "hunyuan-video-1.5/lora"
    assert header["modelspec.implementation"] in ("diffusers", "https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5")
    assert header["modelspec.title"] == exported.parent.name
    assert header["modelspec.resolution"] == "32x32"
    assert "still images" in header["modelspec.description"]
    assert "Tencent Hunyuan Community License" in header["modelspec.license"]
    assert header["vflora.base_model"] == "pipeline"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4.0")
    assert sorted(header["modelspec.trigger_phrase"].split(", ")) == ["blue whale", "green frog", "red fox"]
    assert "red fox" in header["modelspec.usage_hint"]
    recipe = json.loads(header["vflora.recipe"])
    assert (recipe["step"], recipe["lambda_id"], recipe["lora_r"]) == (4, 0.6, 4)


def test_the_hash_is_that_of_all_tensors(exported):
    content = exported.read_bytes()
    tensors = content[8 + int.from_bytes(content[:8], "little") :]
    assert header_of(exported)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()


def test_the_thumbnail_is_a_frame_of_the_newest_validation(exported):
    kind, _, data = header_of(exported)["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (32, 32)


def test_nothing_in_a_file_says_where_things_lie_on_this_machine(exported, trained_run):
    text = json.dumps(header_of(exported))
    assert str(trained_run.parent) not in text
    assert exported.stat().st_mode & 0o777 == 0o644


def test_paths_become_names_and_everything_else_stays(tmp_path):
    settings = {
        "wds_root": str(tmp_path / "data"),
        "dino_head_path": "../runs/head",
        "pipeline_dir": "org/model",
        "lora_r": 16,
        "lora_target_modules": ["a/b"],
        "prompt_bank": None,
        "resume_from_checkpoint": "latest",
    }
    assert shareable(settings) == settings | {"wds_root": "data", "dino_head_path": "head"}
    assert base_model_name("org/model", "480p_i2v") == "org/model"
