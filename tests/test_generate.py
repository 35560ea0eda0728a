import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from PIL import Image

from vflora.errors import UserError
from vflora.generate import run
from vflora.generate_config import GenerateConfig
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import from_transformer, write_lora
from vflora.models.random_weights import randomise_lora, small_pipeline, small_text_to_video, small_transformer
from vflora.video_io import read_mp4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model in diffusers' layout, two adapters, and a picture."""
    root = tmp_path_factory.mktemp("generate")
    small_pipeline().save_pretrained(root / "model")
    for name, seed, alpha in (("a", 1, 2.0), ("b", 2, 1.0)):
        transformer = small_transformer()
        add_lora(transformer, rank=2, alpha=alpha, dropout=0.0, targets=None, seed=seed)
        randomise_lora(transformer.named_parameters(), std=0.3, seed=seed)
        write_lora(from_transformer(transformer, ADAPTER), root / f"{name}.safetensors", "diffusers")
    checkpoint = root / "checkpoint-7" / "lora"
    checkpoint.mkdir(parents=True)
    (checkpoint / "pytorch_lora_weights.safetensors").write_bytes((root / "a.safetensors").read_bytes())
    Image.linear_gradient("L").resize((80, 60)).convert("RGB").save(root / "picture.png")
    return root


def settings(folder, **options):
    defaults = {
        "prompt": "a cat waves",
        "model_path": str(folder / "model"),
        "image_path": folder / "picture.png",
        "video_length": 5,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "dtype": "fp32",
        "device": "cpu",
    }
    return GenerateConfig(**defaults | options)


def frames(folder, tmp_path, **options):
    path = run(settings(folder, output_path=tmp_path / "video.mp4", **options))
    return read_mp4(path)[0].astype(int)


def apart(a, b):
    return np.abs(a - b).mean()


def test_the_mp4_plays_and_every_setting_is_kept_beside_it(folder, tmp_path):
    path = run(
        settings(folder, output_path=tmp_path / "new" / "cat.mp4", fps=12, lora_path=[str(folder / "a.safetensors")])
    )
    video, fps = read_mp4(path)
    assert video.shape == (5, 48, 64, 3)
    assert fps == 12
    kept = json.loads((tmp_path / "new" / "cat.json").read_text())
    assert set(kept["settings"]) == {field.name for field in dataclasses.fields(GenerateConfig)}
    assert kept["settings"]["prompt"] == "a cat waves"
    assert (kept["steps_taken"], kept["guidance_used"], kept["height"], kept["width"]) == (2, 1.0, 48, 64)
    assert kept["adapters"][0] | {"source": None} == {
        "source": None,
        "rank": 2,
        "alpha": 2.0,
        "layers": 22,
        "scale": 0.5,
    }
    assert "torch" in kept["versions"]


@pytest.mark.parametrize(("options", "used"), [({}, 6.0), ({"cfg_distilled": True}, 1.0)])
def test_the_guidance_that_nobody_named_is_kept_with_the_rest(folder, tmp_path, options, used):
    path = run(settings(folder, output_path=tmp_path / "cat.mp4", guidance_scale=None, **options))
    assert json.loads(path.with_suffix(".json").read_text())["guidance_used"] == used


def test_an_adapter_changes_the_video_in_proportion_to_its_scale(folder, tmp_path):
    path = [str(folder / "a.safetensors")]
    base = frames(folder, tmp_path)
    none, half, full = (frames(folder, tmp_path, lora_path=path, lora_scale=[s]) for s in (0.0, 0.5, 1.0))
    assert apart(none, base) == 0
    assert 0 < apart(half, base) < apart(full, base)


def test_a_checkpoint_is_its_adapter(folder, tmp_path):
    from_checkpoint = frames(folder, tmp_path, checkpoint_path=folder / "checkpoint-7", use_lora=True, lora_scale=[0.7])
    from_file = frames(folder, tmp_path, lora_path=[str(folder / "a.safetensors")], lora_scale=[0.7])
    assert apart(from_checkpoint, from_file) == 0


def test_several_adapters_act_together_each_with_its_scale(folder, tmp_path):
    both = [str(folder / "a.safetensors"), str(folder / "b.safetensors")]
    a = frames(folder, tmp_path, lora_path=both[:1], lora_scale=[0.7])
    a_only = frames(folder, tmp_path, lora_path=both, lora_scale=[0.7, 0.0])
    together = frames(folder, tmp_path, lora_path=both, lora_scale=[0.7, 0.7])
    assert apart(a, a_only) == 0
    assert apart(a, together) > 0
    assert apart(together, frames(folder, tmp_path, lora_path=both[::-1], lora_scale=[0.7])) < 0.5


def test_alpha_and_targets_on_the_command_line_win_over_the_file(folder, tmp_path):
    path = [str(folder / "a.safetensors")]
    strong = frames(folder, tmp_path, lora_path=path, lora_scale=[1.0])
    assert apart(frames(folder, tmp_path, lora_path=path, lora_scale=[0.5], lora_alpha=4.0), strong) == 0
    partly = frames(folder, tmp_path, lora_path=path, lora_scale=[1.0], lora_target_modules=["img_attn_q"])
    assert 0 < apart(partly, frames(folder, tmp_path)) < apart(strong, frames(folder, tmp_path))


def test_offloaded_weights_are_read_only_while_they_are_there(folder, tmp_path, monkeypatch):
    # On a CPU nothing moves; here whatever a GPU would not have at hand is NaN.
    class Weights:
        def __init__(self, group):
            inside = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
            self.tensors = [t for t in (*inside, *group.parameters, *group.buffers) if t.is_floating_point()]
            self.real = [tensor.data for tensor in self.tensors]

        def show(self, there):
            for tensor, data in zip(self.tensors, self.real, strict=True):
                tensor.data = data if there else torch.full_like(data, torch.nan)

    kept, arrivals = {}, []

    def offload(group):
        kept.setdefault(id(group), Weights(group)).show(False)

    def onload(group):
        arrivals.append(group)
        kept[id(group)].show(True)

    plain = frames(folder, tmp_path)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    assert apart(frames(folder, tmp_path, group_offloading=True), plain) == 0
    assert len(arrivals) > 100


def test_offloaded_and_cached_runs_go_through(folder, tmp_path, device):
    here = {"device": device, "lora_path": [str(folder / "a.safetensors")]}
    plain = frames(folder, tmp_path, offloading=False, **here)
    for way in ("offloading", "group_offloading"):
        assert apart(frames(folder, tmp_path, **{way: True}, **here), plain) == 0
    here |= {"num_inference_steps": 10}
    cached = frames(folder, tmp_path, enable_cache=True, cache_type="taylorcache", no_cache_block_id="1", **here)
    exact = frames(folder, tmp_path, **here)
    assert 0 < apart(cached, exact) < 40


def test_compiled_blocks_make_the_same_video_and_share_their_code_between_prompts_of_two_lengths(
    folder, tmp_path, monkeypatch
):
    both = {"guidance_scale": 2.0, "negative_prompt": "a long list of everything that nobody wants to see"}
    plain = frames(folder, tmp_path, **both)
    torch._dynamo.reset()
    traced, compile_function = [], torch.compile
    backend = lambda graph, inputs: traced.append(graph) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_function(f, backend=backend))
    frames(folder, tmp_path, enable_torch_compile=True)
    for_one = len(traced)
    assert for_one > 0
    assert apart(frames(folder, tmp_path, enable_torch_compile=True, **both), plain) == 0
    assert len(traced) == for_one
    assert apart(frames(folder, tmp_path, enable_torch_compile=True, group_offloading=True, **both), plain) == 0
    torch._dynamo.reset()


def test_text_to_video_where_the_folder_holds_such_a_model(folder, tmp_path):
    small_text_to_video().save_pretrained(tmp_path / "t2v")
    tall = frames(folder, tmp_path, model_path=str(tmp_path / "t2v"), image_path=None, aspect_ratio="9:16")
    assert tall.shape[1] > tall.shape[2]
    with pytest.raises(UserError, match="--image_path"):
        frames(folder, tmp_path, image_path=None)


def test_without_a_name_the_prompt_and_the_seed_name_the_file(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(settings(folder, seed=9)) == Path("outputs/a-cat-waves-seed9.mp4")


def test_without_a_name_no_video_takes_the_place_of_another(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (run(settings(folder, prompt=prompt)) for prompt in ("一只猫在挥手", "кошка машет лапой"))
    assert (first, second) == (Path("outputs/video-seed123.mp4"), Path("outputs/video-seed123-2.mp4"))
    for path, prompt in ((first, "一只猫在挥手"), (second, "кошка машет лапой")):
        assert json.loads(path.with_suffix(".json").read_text())["settings"]["prompt"] == prompt
    assert run(settings(folder, output_path=first)) == first


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"video_length": 120}, "use 117 or 121"),
        ({"num_frames": 7}, "--num_frames 7 .* use 5 or 9"),
        ({"prompt": " "}, "--prompt is empty"),
        ({"sr": True}, "drop them"),
        ({"save_pre_sr_video": True}, "drop them"),
        ({"rewrite": True}, "drop the flag"),
        ({"sparse_attn": True}, "drop the flag"),
        ({"use_lora": True}, "--lora_path FILE or --checkpoint_path FOLDER"),
        ({"lora_path": ["a", "b", "c"], "lora_scale": [1.0, 0.5]}, "one, or as many"),
        ({"lora_path": ["a"], "checkpoint_path": Path("b")}, "exclude each other"),
        ({"aspect_ratio": "wide"}, "like 16:9"),
        ({"guidance_scale": -1.0}, "--guidance_scale -1.0 must not be negative"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
        ({"output_path": Path("video.gif")}, "--output_path video.gif is no mp4"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(options, fix):
    with pytest.raises(UserError, match=fix):
        GenerateConfig(**{"prompt": "a cat", "model_path": "nowhere"} | options)


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"image_path": Path("missing.png")}, "check --image_path"),
        ({"model_path": "./missing"}, "hf download"),
        ({"lora_path": ["missing.safetensors"]}, "no adapter at missing.safetensors"),
        ({"lora_r": 16}, "rank 2, not --lora_r 16"),
        ({"lora_target_modules": ["img_mlp.fc1"]}, "selects none of the 22 layers"),
        ({"enable_cache": True}, "use --cache_type taylorcache"),
        ({"use_sageattn": True}, "pip install sageattention"),
        ({"model_path": "nobody/nothing"}, "nobody/nothing is no folder here"),
        ({"device": "cuda:99"}, "--device cuda:99 is not on this machine"),
        ({"output_path": Path(__file__) / "video.mp4"}, "is a file and no folder: choose another --output_path"),
    ],
)
def test_files_and_models_that_do_not_fit_are_named_with_the_fix(folder, tmp_path, options, fix):
    options = {"lora_path": [str(folder / "a.safetensors")], "output_path": tmp_path / "video.mp4"} | options
    with pytest.raises(UserError, match=fix):
        run(settings(folder, **options))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_mp4_is_noticed_before_sampling(folder, tmp_path):
    (tmp_path / "video.mp4").mkdir()
    with pytest.raises(UserError, match="is a folder: give the name of the mp4"):
        run(settings(folder, output_path=tmp_path / "video.mp4", model_path="./missing"))


def test_a_resolution_the_transformer_was_not_trained_for_is_refused_before_encoders_are_read(tmp_path, folder):
    small_pipeline(target_size=640).save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    with pytest.raises(UserError, match="use --resolution 480p"):
        run(settings(folder, model_path=str(tmp_path / "model"), resolution="720p"))


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({}, "480p_t2v"),
        ({"image_path": Path("a.png")}, "480p_i2v"),
        ({"image_path": Path("a.png"), "resolution": "720p"}, "720p_i2v"),
        ({"image_path": Path("a.png"), "cfg_distilled": True}, "480p_i2v_distilled"),
        ({"image_path": Path("a.png"), "enable_step_distill": True}, "480p_i2v_step_distilled"),
        ({"transformer_version": "mine"}, "mine"),
    ],
)
def test_the_flags_choose_the_transformer(options, version):
    assert GenerateConfig(prompt="a", model_path="b", **options).version == version


OLD_FLAGS = (
    "prompt negative_prompt resolution model_path aspect_ratio num_inference_steps guidance_scale "
    "video_length num_frames sr save_pre_sr_video rewrite cfg_distilled enable_step_distill sparse_attn "
    "offloading group_offloading overlap_group_offloading dtype seed image_path output_path fps "
    "use_sageattn sage_blocks_range enable_torch_compile enable_cache cache_type no_cache_block_id "
    "cache_start_step cache_end_step total_steps cache_step_interval save_generation_config "
    "checkpoint_path lora_path use_lora lora_r lora_alpha lora_dropout lora_target_modules lora_scale "
)


def test_old_command_lines_still_find_their_flags():
    assert set(OLD_FLAGS.split()) <= {field.name for field in dataclasses.fields(GenerateConfig)}
