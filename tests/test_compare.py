import dataclasses
import json
import logging
import shlex

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from vflora.compare import run
from vflora.compare_config import CompareConfig, command_of
from vflora.errors import UserError
from vflora.inference import load_for_sampling, open_image
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import from_transformer, read_lora, write_lora
from vflora.models.random_weights import randomise_lora, small_pipeline, small_text_to_video, small_transformer
from vflora.sampling import generate_video
from vflora.video_io import enlarge, read_mp4, to_uint8_frames, write_mp4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A small random model in diffusers' layout, a strong adapter, and two pictures."""
    root = tmp_path_factory.mktemp("compare")
    small_pipeline().save_pretrained(root / "model")
    transformer = small_transformer()
    add_lora(transformer, rank=2, alpha=2, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.3)
    write_lora(from_transformer(transformer, ADAPTER), root / "creatures" / "checkpoint-9" / "lora", "diffusers")
    (root / "pictures").mkdir()
    for name, colour in (("momo", "teal"), ("little_wren", "orange")):
        Image.new("RGB", (80, 60), colour).save(root / "pictures" / f"{name}.png")
    return root


def settings(root, folder, **options):
    defaults = {
        "pipeline_dir": str(root / "model"),
        "lora_path": [str(root / "creatures" / "checkpoint-9")],
        "images": [root / "pictures"],
        "output_dir": folder,
        "lora_scales": [1.0, 0.5],
        "prompts": ["{character} waves"],
        "video_length": 9,
        "num_inference_steps": 3,
        "guidance_scale": 2.0,
        "dtype": "fp32",
        "device": "cpu",
    }
    return CompareConfig(**defaults | options)


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    run(settings(root, folder, notice="Random models: noise is expected."))
    return folder


def test_the_folder_is_ready_to_upload(made, root):
    names = {path.name for path in made.iterdir()}
    assert names == {
        "index.html",
        "index.json",
        "README.md",
        "preview.png",
        "pictures",
        "videos",
        "pytorch_lora_weights.safetensors",
    }
    assert len(list((made / "videos").glob("*.mp4"))) == 6
    given = read_lora(root / "creatures" / "checkpoint-9" / "lora").modules
    kept = read_lora(made / "pytorch_lora_weights.safetensors").modules
    assert given.keys() == kept.keys()
    assert all(torch.equal(kept[name].delta(), given[name].delta()) for name in given)
    assert "Random models: noise is expected." in (made / "README.md").read_text()
    assert "<h1>Creatures</h1>" in (made / "index.html").read_text()


def test_a_folder_that_looks_like_a_hub_name_is_not_named_as_the_base_model(made, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root.parent)  # so that the model is at "name/model", as with --local-dir models/NAME
    place = f"{root.name}/model"
    options = {"images": [root / "pictures" / "momo.png"], "lora_scales": [1.0], "video_length": 5}
    run(settings(root, tmp_path / "a", pipeline_dir=place, **options))
    run(settings(root, tmp_path / "b", pipeline_dir=place, base_model="org/base", **options))
    a, b = (ModelCard.load(tmp_path / name / "README.md").data.to_dict() for name in "ab")
    assert "base_model" not in a
    assert (b["base_model"], b["license_name"]) == ("org/base", "tencent-hunyuan-community")
    assert json.loads((tmp_path / "a" / "index.json").read_text())["settings"]["Base model"] == "model"


def test_the_adapter_beside_the_page_shows_its_best_clip(made):
    header = read_lora(made / "pytorch_lora_weights.safetensors").metadata
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")


def test_every_row_has_the_base_and_then_the_scales_in_order(made):
    rows = json.loads((made / "index.json").read_text())["rows"]
    assert [row["character"] for row in rows] == ["little wren", "momo"]
    assert [row["prompt"] for row in rows] == ["little wren waves", "momo waves"]
    for row in rows:
        assert [clip["scale"] for clip in row["clips"]] == [0.0, 0.5, 1.0]
        assert (made / row["picture"]).is_file()
        for clip in row["clips"]:
            frames, _ = read_mp4(made / clip["video"])
            assert len(frames) == len(clip["identity"]["cosines"]) == 9


def test_the_base_is_its_own_measure_and_the_distance_grows_with_the_scale(made):
    for row in json.loads((made / "index.json").read_text())["rows"]:
        base, half, full = row["clips"]
        assert base["teacher_deviation"] == 0.0
        assert base["motion_ratio"] == 1.0
        assert 0 < half["teacher_deviation"] < full["teacher_deviation"]
        bins = full["teacher_deviation_by_sigma"]
        assert bins
        assert all(value > 0 for value in bins.values())


def test_the_base_video_is_that_of_the_model_without_any_adapter(made, root, tmp_path):
    pipeline = load_for_sampling(str(root / "model"), "480p_i2v", "fp32", "cpu")
    picture = open_image(root / "pictures" / "momo.png")
    video = generate_video(pipeline, picture, "momo waves", seed=123, frames=9, steps=3, guidance_scale=2.0)
    alone = write_mp4(tmp_path / "base.mp4", enlarge(to_uint8_frames(video)))
    assert alone.read_bytes() == (made / "videos" / "01-momo-0.mp4").read_bytes()


def test_the_head_of_the_training_grades_beside_the_judge(root, small_models, tmp_path, device):
    heads = {"dino_model_dir": small_models / "dino", "dino_head_path": small_models / "head.safetensors"}
    options = {"images": [root / "pictures" / "momo.png"], "lora_scales": [1.0], "video_length": 5, "device": device}
    run(settings(root, tmp_path, **options, **heads))
    (row,) = json.loads((tmp_path / "index.json").read_text())["rows"]
    for clip in row["clips"]:
        assert len(clip["trained_identity"]["cosines"]) == 5
        assert clip["trained_identity"] != clip["identity"]


def test_how_much_is_to_be_done_is_said_before_anything_is_loaded(root, tmp_path, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match="no model at"):
        run(settings(root, tmp_path, pipeline_dir="./nowhere", seeds=[1, 2, 3], max_rows=5))
    (said,) = (message for message in caplog.messages if "clips of 9 frames" in message)
    assert said.startswith("15 clips of 9 frames: 5 rows, each of the base and 2 scales")
    assert all(flag in said for flag in ("--max_rows", "--lora_scales", "--num_inference_steps"))


def test_several_loras_are_not_said_to_be_beside_the_page(root, tmp_path, caplog):
    lora = root / "creatures" / "checkpoint-9"
    options = {"images": [root / "pictures" / "momo.png"], "lora_scales": [1.0], "video_length": 5}
    (tmp_path / "README.md").write_text("# Mine\n")
    with caplog.at_level(logging.INFO):
        run(settings(root, tmp_path, lora_path=[str(lora), str(lora / "lora")], **options))
    assert not list(tmp_path.glob("*.safetensors"))
    assert "and a model card beside it, but no LoRA" in caplog.text
    assert "README.md is not as compare wrote it and stays" in caplog.text
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    assert "--lora_path checkpoint-9 lora --lora_scale 1" in (tmp_path / "README-2.md").read_text()


def test_what_an_earlier_comparison_left_in_the_folder_is_named_and_kept(root, tmp_path, caplog):
    options = {"lora_scales": [1.0], "video_length": 5, "num_inference_steps": 2}
    run(settings(root, tmp_path, **options))
    assert "earlier comparison" not in caplog.text
    run(settings(root, tmp_path, images=[root / "pictures" / "momo.png"], **options))
    (said,) = (message for message in caplog.messages if "earlier comparison" in message)
    # "momo" was the second row, and is the first one now
    assert said.startswith("6 files in pictures/ and videos/ are of an earlier comparison")
    assert "(00-little-wren.png, 01-momo.png, 00-little-wren-0.mp4, ...)" in said
    assert (tmp_path / "videos" / "00-little-wren-0.mp4").is_file()


@pytest.mark.parametrize(("given", "shown"), [(None, 6.0), (2.0, 2.0)])
def test_the_guidance_is_shown_as_it_was(root, tmp_path, given, shown):
    options = {"images": [root / "pictures" / "momo.png"], "lora_scales": [1.0], "video_length": 5}
    run(settings(root, tmp_path, guidance_scale=given, **options))
    assert json.loads((tmp_path / "index.json").read_text())["settings"]["Guidance scale"] == shown


def test_the_printed_command_has_every_setting_that_was_chosen(made, root):
    command = json.loads((made / "index.json").read_text())["command"]
    words = shlex.split(command)
    assert words[:2] == ["vflora", "compare"]
    for flag, values in (("--lora_scales", ["1.0", "0.5"]), ("--prompts", ["{character} waves"]), ("--seeds", None)):
        if values is None:
            assert flag not in words  # left at its default
        else:
            place = words.index(flag)
            assert words[place + 1 : place + 1 + len(values)] == values
    assert {word for word in words if word.startswith("--")} <= {
        f"--{f.name}" for f in dataclasses.fields(CompareConfig)
    }
    assert command == command_of(settings(root, made, notice="Random models: noise is expected."))


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"video_length": 60}, "use 57 or 61"),
        ({"lora_scales": [0.5, 0.5]}, "different positive numbers"),
        ({"lora_scales": [0.0]}, "the base is always shown"),
        ({"dino_model_dir": "a"}, "give both or neither"),
        ({"guidance_scale": -1.0}, "--guidance_scale -1.0 must not be negative"),
        ({"num_inference_steps": -3}, "--num_inference_steps must be at least 1"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
        ({"fps": 0}, "--fps must be at least 1"),
        ({"max_page_mb": 0.0}, "--max_page_mb must be above 0"),
        ({"seeds": []}, "at least one number"),
        ({"lora_path": []}, "name the LoRA"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(root, tmp_path, options, fix):
    with pytest.raises(UserError, match=fix):
        settings(root, tmp_path, **options)


def test_missing_files_are_named_before_anything_is_loaded(root, tmp_path):
    for options, fix in (
        ({"lora_path": ["missing.safetensors"]}, "no adapter at missing.safetensors"),
        ({"images": [tmp_path]}, "no pictures in"),
        ({"images": [tmp_path / "x.png"]}, "check --images"),
    ):
        with pytest.raises(UserError, match=fix):
            run(settings(root, tmp_path / "out", pipeline_dir="./nowhere", **options))
    assert not (tmp_path / "out").exists()


def test_what_is_used_late_is_looked_at_before_anything_is_loaded(root, small_models, tmp_path):
    small_text_to_video().save_pretrained(tmp_path / "t2v")
    (tmp_path / "file").touch()
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    dino, head = small_models / "dino", small_models / "head.safetensors"
    nowhere = {"pipeline_dir": "./nowhere"}
    for options, fix in (
        ({"output_dir": tmp_path / "file", **nowhere}, "is a file and no folder: choose another --output_dir"),
        ({"judge_model_dir": tmp_path / "missing", **nowhere}, "There is no model in"),
        ({"judge_model_dir": tmp_path / "judge", **nowhere}, "no .safetensors files in"),
        ({"dino_model_dir": tmp_path / "missing", "dino_head_path": head, **nowhere}, "There is no DINOv3 model in"),
        ({"dino_model_dir": dino, "dino_head_path": tmp_path / "missing", **nowhere}, "There is no identity head at"),
        ({"pipeline_dir": str(tmp_path / "t2v"), "lora_path": ["missing"]}, "compare starts from pictures"),
    ):
        with pytest.raises(UserError, match=fix):
            run(settings(root, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
