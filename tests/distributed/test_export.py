"""What several processes saved, read by one: our checkpoints, and a whole sharded transformer of the reference."""

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from vflora.adapters import find_adapter
from vflora.checkpoint import read_tensors
from vflora.cli import main, parse
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import from_transformer, read_lora, to_state_dict, write_lora
from vflora.models.random_weights import randomise_lora, small_transformer
from vflora.train import run as train

RANK, ALPHA = 4, 16.0


def test_a_checkpoint_of_two_processes_is_exported_by_one_value_for_value(launch, train_flags, tmp_path):
    flags = ["--train_video_length", "5", "--max_train_steps", "2", "--batch_size", "1", "--condition_lookahead", "1"]
    folder = launch(2, partial(train, parse("train", [*train_flags, *flags])))[0]
    assert len(list((folder / "dcp").glob("*.distcp"))) == 2
    command = ["export", "--checkpoint_path", str(folder), "--output_dir", str(tmp_path / "adapter")]
    assert main([*command, "--dtype", "fp32"]) == 0
    exported = read_lora(tmp_path / "adapter")
    assert find_adapter(folder / "dcp") == find_adapter(folder), "whoever names the dcp folder means the same"
    trained = {name: value for name, value in read_tensors(folder).items() if name.startswith("lora/")}
    assert 2 * len(exported) == len(trained)
    assert any(value.any() for name, value in trained.items() if ".lora_B." in name), "the training has moved it"
    for name, module in exported.modules.items():
        a, b = (trained[f"lora/{name}.lora_{factor}.{ADAPTER}.weight"] for factor in "AB")
        torch.testing.assert_close(module.delta(), b.double() @ a.double(), rtol=1e-6, atol=1e-9)


def trained_transformer():
    transformer = small_transformer()
    add_lora(transformer, rank=RANK, alpha=ALPHA, dropout=0.0, targets=None, seed=1)
    randomise_lora(transformer.named_parameters(), std=0.1)
    return transformer


def save_as_the_reference_does(folder, world):
    """The whole transformer in pieces, base and LoRA, under original names, with the optimizer's state beside it."""
    mesh = init_device_mesh("cpu", (world.size,))
    tensors, _ = to_state_dict(from_transformer(trained_transformer(), ADAPTER), "original")  # with alpha folded in
    model, moments = {}, {}

    def piece(value):
        return distribute_tensor(value, mesh, [Shard(0) if value.shape[0] >= world.size else Replicate()])

    for key, value in tensors.items():
        module, part, _ = key.rsplit(".", 2)
        name = f"{module}.{part}.default.weight"
        model[name] = piece((value / (ALPHA / RANK) if part == "lora_B" else value).contiguous())
        model[f"{module}.base_layer.weight"] = piece(torch.ones(6, 2))
        moments[name] = {"exp_avg": piece(torch.zeros_like(value)), "step": torch.tensor(3.0)}
    dcp.save({"model": model, "optimizer": {"state": moments}}, checkpoint_id=folder / "dcp")
    dist.barrier()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tmp_path_factory.mktemp("reference") / "checkpoint-1000"


@pytest.fixture
def reference_checkpoint(reference, in_processes):
    """Saved by two processes, once."""
    if not reference.exists():
        in_processes(2, partial(save_as_the_reference_does, reference))
    assert len(list((reference / "dcp").glob("*.distcp"))) == 2
    return reference


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya", "original"])
def test_the_reference_s_checkpoint_becomes_an_adapter_of_every_format(reference_checkpoint, tmp_path, format):
    command = ["export", "--checkpoint_path", str(reference_checkpoint), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--dtype", "fp32", "--format", format]) == 0
    (file,) = (tmp_path / "out").glob("*.safetensors")
    wanted, found = from_transformer(trained_transformer(), ADAPTER), read_lora(file)
    assert found.modules.keys() == wanted.modules.keys()
    for name, module in wanted.modules.items():
        torch.testing.assert_close(found.modules[name].delta(), module.delta(), rtol=1e-5, atol=1e-7)


def test_another_alpha_of_the_reference_s_run_changes_the_strength(reference_checkpoint, tmp_path):
    command = ["export", "--checkpoint_path", str(reference_checkpoint), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--dtype", "fp32", "--lora_alpha", "8"]) == 0
    for name, module in from_transformer(trained_transformer(), ADAPTER).modules.items():
        torch.testing.assert_close(
            read_lora(tmp_path / "out").modules[name].delta(), module.delta() / 2, rtol=1e-5, atol=1e-7
        )


@pytest.fixture
def sampling_flags(small_models, tmp_path):
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "fox.png")
    return ["--video_length", "5", "--num_inference_steps", "2", "--guidance_scale", "1", "--dtype", "fp32"]


def test_generate_takes_the_reference_s_checkpoint(reference_checkpoint, small_models, sampling_flags, tmp_path):
    adapter = write_lora(from_transformer(trained_transformer(), ADAPTER), tmp_path / "adapter", "diffusers")
    flags = [*sampling_flags, "--model_path", str(small_models / "pipeline"), "--image_path", str(tmp_path / "fox.png")]
    flags += ["--prompt", "a fox waves", "--lora_scale", "1.0", "--device", "cpu", "--output_path"]
    videos = [tmp_path / "by_checkpoint.mp4", tmp_path / "by_file.mp4"]
    assert main(["generate", *flags, str(videos[0]), "--checkpoint_path", str(reference_checkpoint)]) == 0
    assert main(["generate", *flags, str(videos[1]), "--lora_path", str(adapter)]) == 0
    assert videos[0].read_bytes() == videos[1].read_bytes()
    facts = json.loads(videos[0].with_suffix(".json").read_text())["adapters"][0]
    assert (facts["rank"], facts["alpha"], facts["layers"]) == (RANK, ALPHA, 22)


def test_compare_takes_the_reference_s_checkpoint(reference_checkpoint, small_models, sampling_flags, tmp_path):
    flags = [*sampling_flags, "--pipeline_dir", str(small_models / "pipeline"), "--images", str(tmp_path / "fox.png")]
    flags += ["--lora_path", str(reference_checkpoint), "--lora_scales", "1.0", "--prompts", "a fox waves"]
    assert main(["compare", *flags, "--device", "cpu", "--output_dir", str(tmp_path / "page")]) == 0
    assert len(list((tmp_path / "page" / "videos").iterdir())) == 2
    written = read_lora(tmp_path / "page")
    for name, module in from_transformer(trained_transformer(), ADAPTER).modules.items():
        torch.testing.assert_close(written.modules[name].delta(), module.delta(), rtol=1e-2, atol=1e-3)
