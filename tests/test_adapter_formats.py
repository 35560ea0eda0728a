"""Every command that takes an adapter reads all four formats, and several adapters add up."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vflora.adapters import add_adapters
from vflora.cli import main, parse
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import FORMATS, from_transformer, write_lora
from vflora.models.random_weights import randomise_lora, small_pipeline, small_transformer
from vflora.training_setup import set_up
from vflora.video_io import read_mp4


def trained(seed, rank=2, alpha=3.0):
    transformer = small_transformer()
    add_lora(transformer, rank=rank, alpha=alpha, dropout=0.0, targets=None, seed=seed)
    randomise_lora(transformer.named_parameters(), std=0.2, seed=seed)
    return from_transformer(transformer, ADAPTER)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A model; four adapters, one in each format; the first adapter in all formats; and a picture."""
    root = tmp_path_factory.mktemp("formats")
    small_pipeline().save_pretrained(root / "model")
    adapters = [trained(seed, rank=2 + seed % 2, alpha=2.0 + seed) for seed in range(1, 5)]
    mixed = [write_lora(w, root / f"mixed-{f}.safetensors", f) for w, f in zip(adapters, FORMATS, strict=True)]
    same = {f: write_lora(adapters[0], root / f"same-{f}.safetensors", f) for f in FORMATS}
    Image.linear_gradient("L").resize((80, 60)).convert("RGB").save(root / "picture.png")
    return root, adapters, mixed, same


def merge(transformer, adapters, scales):
    """The sum of the weight deltas, added by hand."""
    for weights, scale in zip(adapters, scales, strict=True):
        for name, update in weights.modules.items():
            delta = update.alpha / update.rank * update.up.double() @ update.down.double()
            layer = transformer.get_submodule(name)
            layer.weight.data = (layer.weight.data.double() + scale * delta).float()
    return transformer


def generate(root, folder, model="model", **lists):
    flags = [word for name, values in lists.items() for word in (f"--{name}", *map(str, values))]
    command = ["generate", "--model_path", str(root / model), "--image_path", str(root / "picture.png")]
    command += ["--prompt", "a cat waves", "--video_length", "5", "--num_inference_steps", "2", "--guidance_scale", "1"]
    command += ["--dtype", "fp32", "--device", "cpu", "--output_path", str(folder / "video.mp4")]
    assert main([*command, *flags]) == 0
    return read_mp4(folder / "video.mp4")[0].astype(int)


def apart(a, b):
    return np.abs(a - b).mean()


@pytest.mark.parametrize("count", [2, 4])
def test_several_adapters_of_several_formats_are_the_sum_of_their_weight_deltas(kit, make_conditions, count):
    root, adapters, mixed, _ = kit
    scales = (0.7, 0.5, 0.3, 1.1)[:count]
    together = small_transformer()
    added = add_adapters(together, mixed[:count], scales)
    assert [info.scale for info in added] == list(scales)
    by_hand = merge(small_transformer(), adapters[:count], scales)
    swapped = merge(small_transformer(), adapters[:count], scales[::-1])

    @torch.no_grad()
    def output(transformer):
        conditions = make_conditions((7,), (3,))
        return transformer(
            hidden_states=torch.randn(1, 9, 2, 4, 4, generator=torch.Generator().manual_seed(0)),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=conditions.prompt_embeds,
            encoder_attention_mask=torch.ones(1, 7),
            encoder_hidden_states_2=conditions.prompt_embeds_2,
            encoder_attention_mask_2=torch.ones(1, 3),
            image_embeds=conditions.image_embeds,
        ).sample

    torch.testing.assert_close(output(together), output(by_hand), rtol=0, atol=2e-5)
    assert (output(together) - output(swapped)).abs().max() > 1e-2  # each scale belongs to its own adapter


def test_the_command_gives_the_video_of_the_model_merged_by_hand(kit, tmp_path):
    root, adapters, mixed, _ = kit
    scales = (0.7, 0.5, 0.3, 1.1)
    pipeline = small_pipeline()
    merge(pipeline.transformer, adapters, scales)
    pipeline.save_pretrained(tmp_path / "merged")
    merged = generate(root, tmp_path, model=tmp_path / "merged")
    together = generate(root, tmp_path, lora_path=mixed, lora_scale=scales)
    assert apart(together, merged) < 0.05
    assert apart(together, generate(root, tmp_path)) > 1
    assert apart(together, generate(root, tmp_path, lora_path=mixed, lora_scale=scales[::-1])) > 0.5
    kept = json.loads((tmp_path / "video.json").read_text())["adapters"]
    assert [entry["scale"] for entry in kept] == list(scales[::-1])


def test_generate_reads_every_format(kit, tmp_path):
    root, _, _, same = kit
    videos = {f: generate(root, tmp_path, lora_path=[same[f]], lora_scale=[0.8]) for f in FORMATS}
    assert apart(videos["diffusers"], generate(root, tmp_path)) > 1
    assert all(apart(videos[f], videos["diffusers"]) < 0.05 for f in FORMATS)


def test_compare_reads_every_format(kit, tmp_path):
    root, _, _, same = kit
    found = {}
    for format in FORMATS:
        command = ["compare", "--pipeline_dir", str(root / "model"), "--lora_path", str(same[format])]
        command += ["--images", str(root / "picture.png"), "--output_dir", str(tmp_path / format)]
        command += ["--lora_scales", "0.8", "--prompts", "it waves", "--video_length", "5"]
        command += ["--num_inference_steps", "2", "--guidance_scale", "1", "--dtype", "fp32", "--device", "cpu"]
        assert main(command) == 0
        summary = json.loads((tmp_path / format / "index.json").read_text())["summary"]["0.8"]
        found[format] = [summary["identity_last_quarter"], summary["teacher_deviation"]]
    assert found["diffusers"][1] > 1e-4
    for format in FORMATS:
        assert found[format] == pytest.approx(found["diffusers"], rel=1e-3)


def test_training_starts_from_every_format(kit, train_flags):
    _, adapters, _, same = kit
    for format in FORMATS:
        flags = ["--lora_r", "3", "--lora_alpha", "6", "--pretrained_lora_path", str(same[format])]
        training = set_up(parse("train", [*train_flags, *flags]))
        start = from_transformer(training.denoiser.transformer, ADAPTER)
        assert start.modules.keys() == adapters[0].modules.keys()
        for name, update in adapters[0].modules.items():
            torch.testing.assert_close(start.modules[name].delta(), update.delta(), rtol=1e-5, atol=1e-7)
