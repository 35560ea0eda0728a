import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vflora
from vflora.cli import parse


def settings_of(flags):
    """Flags of a command line, each with one value, as keyword arguments."""
    return {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, vflora, vflora.cli; dir(vflora); print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


def test_every_public_name_is_there_and_none_hides_behind_a_module():
    modules = {path.stem for path in Path(vflora.__file__).parent.iterdir()}
    for name in vflora.__all__:
        assert getattr(vflora, name) is not None
        assert name in dir(vflora)
        assert name == "__version__" or name not in modules
    with pytest.raises(AttributeError, match="no attribute 'generate_a_film'"):
        _ = vflora.generate_a_film


def test_settings_in_python_are_those_of_the_command_line(train_flags):
    flags = [*train_flags, "--enable_validation", "--lora_target_modules", "img_attn_q", "attn.to_k"]
    assert vflora.configure(
        "train",
        **settings_of(train_flags),
        enable_validation=True,
        lora_target_modules=["img_attn_q", "attn.to_k"],
    ) == parse("train", flags)


def test_numbers_paths_lists_and_none_keep_their_kind(tmp_path):
    config = vflora.configure(
        "compare",
        pipeline_dir="hub/name",
        lora_path=[tmp_path / "a, b.safetensors"],
        images=[tmp_path],
        output_dir=tmp_path / "page",
        lora_scales=(0.5, 1),
        seeds=[1, 2],
        prompt_bank=None,
        offloading=False,
    )
    assert config.lora_path == [str(tmp_path / "a, b.safetensors")]
    assert config.images == [tmp_path]
    assert config.lora_scales == [0.5, 1.0]
    assert config.prompt_bank is None
    assert not config.offloading


def test_a_mode_sets_its_flags_in_python_too(train_flags):
    speed = vflora.configure("train", **settings_of(train_flags), mode="low_memory", id_decode_tile=64).speed
    assert (speed.weight_storage, speed.id_decode_tile) == ("int8", 64)


@pytest.mark.parametrize(
    ("command", "settings", "sentence"),
    [
        ("trian", {}, "There is no command 'trian': use one of data pack"),
        ("export", {"checkpoint_path": "a", "output_dir": "b", "fromat": "comfyui"}, "fromat"),
        ("export", {"checkpoint_path": "a", "output_dir": "b", "lora_r": 0}, "--lora_r must be at least 1"),
        ("export", {"checkpoint_path": "a", "output_dir": "b", "print_config": "skip_unset"}, "leave out print_config"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(command, settings, sentence, capsys):
    with pytest.raises(vflora.UserError, match=sentence):
        vflora.configure(command, **settings)


def test_a_run_taken_step_by_step_equals_the_command_to_the_last_bit(train_flags, tmp_path):
    settings = settings_of(train_flags) | {"max_train_steps": 2}
    with vflora.open_training(**settings | {"output_dir": tmp_path / "notebook"}) as training:
        steps = [training.step() for _ in range(training.total_steps)]
        assert training.is_finished
        with pytest.raises(vflora.UserError, match="all 2 steps are done"):
            training.step()
    checkpoint = vflora.run("train", **settings | {"output_dir": tmp_path / "command"})
    assert steps[0]["loss/distill"] == 0.0
    assert checkpoint.name == "checkpoint-2"
    file = Path("checkpoint-2", "lora", "pytorch_lora_weights.safetensors")
    ours, theirs = (load_file(tmp_path / who / file) for who in ("notebook", "command"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_can_be_saved_at_any_step_and_goes_on_from_there(train_flags):
    settings = settings_of(train_flags)
    with vflora.open_training(**settings) as training:
        training.step()
        checkpoint = training.save()
        assert training.save() == checkpoint
    assert checkpoint.name == "checkpoint-1"
    with vflora.open_training(**settings, resume_from_checkpoint="latest") as training:
        assert training.step_count == 1
        assert training.step()["loss/distill"] > 0


def test_a_loaded_lora_changes_the_video_and_its_scale_0_is_the_base(train_flags, small_models, tmp_path):
    with vflora.open_training(**settings_of(train_flags)) as training:
        training.step()
        checkpoint = training.save()
    folder = small_models / "pipeline"
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "picture.png")
    picture = vflora.open_image(str(tmp_path / "picture.png"))
    options = {"seed": 1, "frames": 5, "steps": 2}
    base = vflora.generate_video(vflora.load_pipeline(folder, dtype="fp32"), picture, "it runs", **options)
    taught = vflora.load_pipeline(folder, checkpoint, lora_scale=3.0, dtype="fp32")
    assert torch.equal(vflora.generate_video(taught, picture, "it runs", **options, lora_scale=0.0), base)
    light = {"group_offloading": True, "prompts": "it runs"}
    layers = vflora.load_pipeline(folder, checkpoint, lora_scale=3.0, dtype="fp32", **light)
    assert layers.text_encoder is None
    for scale in (0.0, 3.0):
        options["lora_scale"] = scale
        shown, expected = (vflora.generate_video(pipe, picture, "it runs", **options) for pipe in (layers, taught))
        assert torch.equal(shown, expected)
    options.pop("lora_scale")
    assert not torch.equal(vflora.generate_video(taught, picture, "it runs", **options), base)
    assert base.shape[:2] == (3, 5)


def test_as_many_strengths_as_loras(small_models):
    with pytest.raises(vflora.UserError, match="lora_scale has 2 values for 1 LoRAs"):
        vflora.load_pipeline(small_models / "pipeline", "a.safetensors", lora_scale=[0.5, 0.5])
