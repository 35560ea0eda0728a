import dataclasses
import hashlib
import json
import resource

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from vflora.errors import UserError
from vflora.export import ExportConfig, reduce_rank, run
from vflora.models.lora import ADAPTER, add_lora
from vflora.models.lora_formats import FORMATS, LoraModule, LoraWeights, from_transformer, read_lora, write_lora
from vflora.models.random_weights import randomise_lora, small_transformer


@pytest.fixture(scope="module")
def trained():
    transformer = small_transformer()
    add_lora(transformer, rank=4, alpha=6, dropout=0.0, targets=None, seed=0)
    randomise_lora(transformer.named_parameters(), std=0.3)
    return from_transformer(transformer, ADAPTER)


@pytest.fixture
def checkpoint(tmp_path, trained):
    folder = tmp_path / "checkpoint-7"
    header = {"vflora.base_model": "a/model 480p_i2v", "vflora.recipe": '{"lambda_id": 0.6}'}
    file = write_lora(trained, folder / "lora", "diffusers", header)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"lora/pytorch_lora_weights.safetensors": digest}))
    return folder


def export(checkpoint, tmp_path, **options):
    return run(ExportConfig(checkpoint_path=checkpoint, output_dir=tmp_path / "adapter", **options))


def header_of(file):
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def deltas(weights):
    return {name: module.delta() for name, module in weights.modules.items()}


def farthest(a, b):
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / b[k].norm()).item() for k in a)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_keeps_the_update_and_fp32_keeps_it_exactly_enough(checkpoint, tmp_path, trained, format):
    file = export(checkpoint, tmp_path, format=format, dtype="fp32")
    assert farthest(deltas(read_lora(file)), deltas(trained)) < 1e-6
    with safe_open(file, framework="pt") as opened:
        kinds = {opened.get_tensor(k).dtype for k in opened.keys() if "lora" in k.rsplit(".", 2)[1]}  # noqa: SIM118
    assert kinds == {torch.float32}


def test_the_file_for_diffusers_loads_into_its_transformer_with_the_right_strength(checkpoint, tmp_path, trained):
    folder = export(checkpoint, tmp_path, dtype="fp32").parent
    transformer = small_transformer()
    transformer.load_lora_adapter(folder, prefix="transformer", use_safetensors=True, adapter_name="x")
    assert farthest(deltas(from_transformer(transformer, "x")), deltas(trained)) < 1e-6


def test_bf16_rounds_once_and_halves_the_file(checkpoint, tmp_path, trained):
    small = export(checkpoint, tmp_path)
    assert farthest(deltas(read_lora(small)), deltas(trained)) < 6e-3
    half_size = small.stat().st_size
    assert half_size < 0.75 * export(checkpoint, tmp_path, dtype="fp32").stat().st_size


def test_rank_alpha_and_layers_come_from_the_checkpoint(checkpoint, tmp_path, trained):
    file = export(checkpoint, tmp_path, format="kohya")
    weights = read_lora(file)
    assert (weights.rank, len(weights)) == (4, len(trained))
    assert weights.modules.keys() == trained.modules.keys()


@pytest.mark.parametrize(("alpha", "factor"), [(6, 1), (12, 2)])
def test_alpha_is_the_one_of_training_and_another_changes_the_strength_in_proportion(
    checkpoint, tmp_path, trained, alpha, factor
):
    file = export(checkpoint, tmp_path, lora_alpha=alpha, dtype="fp32")
    expected = {name: factor * delta for name, delta in deltas(trained).items()}
    assert farthest(deltas(read_lora(file)), expected) < 1e-6


def test_named_layers_only(checkpoint, tmp_path):
    weights = read_lora(export(checkpoint, tmp_path, lora_target_modules=["img_attn_q", "attn.to_k"]))
    assert {name.split(".", 2)[2] for name in weights.modules} == {"attn.to_q", "attn.to_k"}


def test_a_smaller_rank_gives_the_nearest_update_and_the_same_strength():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 20, generator=generator), torch.randn(12, 4, generator=generator)
    module = LoraModule(down, up, 6.0)
    weights, lost = reduce_rank(LoraWeights({"layer": module}), 2)
    small = weights.modules["layer"]
    u, values, v = torch.linalg.svd(module.delta())
    nearest = u[:, :2] * values[:2] @ v[:2]
    assert torch.allclose(small.delta(), nearest, atol=1e-5)
    assert lost == pytest.approx((values[2:].norm() / values.norm()).item(), rel=1e-5)
    assert small.rank == 2


def test_rank_can_shrink_but_not_grow(checkpoint, tmp_path):
    assert read_lora(export(checkpoint, tmp_path, lora_r=2)).rank == 2
    with pytest.raises(UserError, match="at most 4"):
        export(checkpoint, tmp_path, lora_r=16)


def test_the_header_says_what_it_is(checkpoint, tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "thumb.png")
    flags = {"name": "Creatures", "author": "me", "characters": ["Momo"], "thumbnail": tmp_path / "thumb.png"}
    header = header_of(export(checkpoint, tmp_path, **flags))
    assert header["modelspec.title"] == "Creatures"
    assert header["modelspec.trigger_phrase"] == "Momo"
    assert header["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert header["vflora.base_model"] == "a/model 480p_i2v"
    assert json.loads(header["vflora.recipe"]) == {"lambda_id": 0.6}
    renamed = header_of(export(checkpoint, tmp_path, model_path="b/other", transformer_version="720p_i2v"))
    assert renamed["vflora.base_model"] == "b/other 720p_i2v"


def test_files_for_other_programs_carry_their_name_and_format(checkpoint, tmp_path):
    assert export(checkpoint, tmp_path).name == "pytorch_lora_weights.safetensors"
    assert export(checkpoint, tmp_path, format="comfyui", name="momo").name == "momo-comfyui.safetensors"


def test_a_damaged_checkpoint_is_not_exported(checkpoint, tmp_path):
    file = checkpoint / "lora" / "pytorch_lora_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        export(checkpoint, tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_a_disk_that_does_not_take_the_file_is_told_and_nothing_is_left(checkpoint, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .* make room there"):
            run(ExportConfig(checkpoint, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_in_the_place_of_the_folder_is_refused(checkpoint, tmp_path):
    (tmp_path / "adapter").write_text("in the way")
    with pytest.raises(UserError, match="is a file and no folder: choose another --output_dir"):
        export(checkpoint, tmp_path)


def test_a_folder_without_an_adapter_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match="checkpoint with a lora folder"):
        export(tmp_path / "checkpoint-1", tmp_path)


def test_old_command_lines_still_find_their_flags():
    old = (
        "model_path transformer_version checkpoint_path output_dir dtype lora_r lora_alpha lora_dropout "
        "lora_target_modules"
    )
    assert set(old.split()) <= {field.name for field in dataclasses.fields(ExportConfig)}
