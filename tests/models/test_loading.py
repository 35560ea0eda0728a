"""The transformer as diffusers loads it, from a folder or the hub's cache; what does not fit is told."""

import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import HunyuanVideo15Transformer3DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from vflora.errors import UserError
from vflora.models.loading import load_transformer, open_transformer
from vflora.models.lora import add_lora
from vflora.models.random_weights import small_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder with nothing but a transformer, whose weights are in one file."""
    small_transformer().save_pretrained(tmp_path / "pipeline" / "transformer")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path / "pipeline"


def require_same(ours, wanted):
    ours, wanted = ours.state_dict(), wanted.state_dict()
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("pieces", ["one", "several"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_what_diffusers_loads_frozen(folder, dtype, pieces):
    if pieces == "several":
        shutil.rmtree(folder / "transformer")
        small_transformer().save_pretrained(folder / "transformer", max_shard_size="50KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    loaded = load_transformer(str(folder), "480p_i2v", dtype, "cpu")
    require_same(loaded, HunyuanVideo15Transformer3DModel.from_pretrained(folder / "transformer", dtype=dtype))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_weights_of_another_precision_beside_them_are_left_alone(folder):
    halved = {name: value.half() for name, value in load_file(folder / "transformer" / WEIGHTS).items()}
    save_file(halved, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    require_same(load_transformer(str(folder), "480p_i2v", torch.float32, "cpu"), small_transformer())


def test_a_name_on_the_hub_is_found_in_its_cache(folder, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--org--model"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    require_same(load_transformer("org/model", "480p_i2v", torch.float32, "cpu"), small_transformer())


@pytest.mark.parametrize("damage", ["missing", "another shape", "not known", "another name"])
def test_weights_that_do_not_fit_are_named(folder, damage):
    file = folder / "transformer" / WEIGHTS
    tensors = load_file(file)
    value = tensors.pop("proj_out.weight")
    if damage == "another shape":
        tensors["proj_out.weight"] = value.mT.contiguous()
    elif damage == "not known":
        tensors |= {"proj_out.weight": value, "proj_out.strength": torch.ones(1)}
    save_file(tensors, file)
    sentence = {
        "missing": "do not fit: missing proj_out.weight; download them again",
        "another shape": r"proj_out.weight in .* is \[32, 4\] but the model needs \[4, 32\]: check",
        "not known": "do not fit: not known proj_out.strength",
        "another name": f"{WEIGHTS} is missing: give the weights this name",
    }[damage]
    if damage == "another name":
        file.rename(file.with_name("model.safetensors"))
    with pytest.raises(UserError, match=sentence):
        load_transformer(str(folder), "480p_i2v", torch.float32, "cpu")


def test_an_opened_one_has_no_memory_and_its_files_are_not_read(folder):
    (folder / "transformer" / WEIGHTS).rename(folder / "elsewhere.safetensors")
    save_file({"cut": torch.ones(1)}, folder / "transformer" / WEIGHTS)
    opened, files = open_transformer(str(folder), "480p_i2v", torch.bfloat16)
    assert {(p.device.type, p.dtype, p.requires_grad) for p in opened.parameters()} == {("meta", torch.bfloat16, False)}
    assert [file.name for file in files.shards] == [WEIGHTS]


@pytest.mark.parametrize("targets", [None, ["cond_type_embed", "x_embedder.proj", "attn.to_q"]])
def test_a_lora_starts_with_the_same_numbers_on_a_transformer_without_memory(targets):
    whole = small_transformer()
    with init_empty_weights(include_buffers=False):
        empty = HunyuanVideo15Transformer3DModel(**{k: v for k, v in whole.config.items() if not k.startswith("_")})
    for transformer in (whole, empty):
        add_lora(transformer, rank=2, alpha=2, dropout=0.0, targets=targets, seed=3)
    wanted = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    found = {name: p for name, p in empty.named_parameters() if p.requires_grad}
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], p) and found[name].dtype == torch.float32 for name, p in wanted.items())
    assert all(p.is_meta for p in empty.parameters() if not p.requires_grad)
    for name, p in wanted.items():  # one factor of a pair is zero, the other is not
        assert p.any() == ("lora_A" in name or "lora_embedding_B" in name), name
