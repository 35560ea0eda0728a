import json
import shutil
import weakref

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from safetensors.torch import load_file, save_file

from vflora.errors import UserError
from vflora.models.original_encoders import load_original_encoders
from vflora.models.original_layout import (
    Version,
    convert_transformer_tensor,
    is_original_layout,
    load_original_transformer,
    load_original_vae,
    transformer_settings,
    transformer_versions,
)
from vflora.models.random_original import original_transformer_state, write_small_original
from vflora.models.random_weights import small_transformer

BLOCK_KEYS = [
    "img_mod.linear", "txt_mod.linear", "img_attn_q", "img_attn_k", "img_attn_v", "img_attn_proj", "txt_attn_q",
    "txt_attn_k", "txt_attn_v", "txt_attn_proj", "img_mlp.fc1", "img_mlp.fc2", "txt_mlp.fc1", "txt_mlp.fc2",
]  # fmt: skip
REFINER_KEYS = ["norm1", "norm2", "self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, write_small_original(folder)


@pytest.fixture
def broken(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "copy")
    return tmp_path / "copy"


def _inputs(meanflow=False):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": noise(1, 9, 2, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(1, 5, 16),
        "encoder_attention_mask": torch.ones(1, 5),
        "encoder_hidden_states_2": noise(1, 3, 32),
        "encoder_attention_mask_2": torch.ones(1, 3),
        "image_embeds": noise(1, 4, 12),
    } | ({"timestep_r": torch.tensor([400.0])} if meanflow else {})


def test_the_files_carry_the_original_names(original):
    folder, _ = original
    keys = set()
    for shard in (folder / "transformer/480p_i2v").glob("*.safetensors"):
        keys |= set(load_file(shard))
    assert {f"double_blocks.1.{name}.weight" for name in BLOCK_KEYS} <= keys
    assert {f"txt_in.individual_token_refiner.blocks.0.{name}.bias" for name in REFINER_KEYS} <= keys
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    for key in (
        "encoder.down.0.block.0.conv1.conv.weight",
        "encoder.down.3.downsample.conv.conv.bias",
        "encoder.mid.attn_1.q.weight",
        "decoder.mid.block_2.norm2.gamma",
        "decoder.up.1.upsample.conv.conv.weight",
        "decoder.up.4.block.1.conv2.conv.weight",
    ):
        assert key in vae


def test_it_is_recognised_by_looking(original, tmp_path):
    folder, pipeline = original
    assert is_original_layout(folder)
    assert transformer_versions(folder) == ["480p_i2v"]
    assert not is_original_layout(tmp_path)
    pipeline.save_config(tmp_path)
    assert not is_original_layout(tmp_path)


@torch.no_grad()
def test_the_transformer_gives_the_same_output(original):
    folder, pipeline = original
    loaded = load_original_transformer(folder, "480p_i2v", torch.float32, "cpu")
    assert torch.equal(loaded(**_inputs()).sample, pipeline.transformer(**_inputs()).sample)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    sizes = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    assert {key: loaded.config[key] for key in sizes} == sizes | {"target_size": 640}


@torch.no_grad()
def test_a_step_distilled_transformer_keeps_its_second_time(tmp_path):
    pipeline = write_small_original(tmp_path, "480p_i2v_step_distilled", use_meanflow=True, layers=1)
    loaded = load_original_transformer(tmp_path, "480p_i2v_step_distilled", None, "cpu")
    assert loaded.config.use_meanflow
    assert torch.equal(loaded(**_inputs(True)).sample, pipeline.transformer(**_inputs(True)).sample)


@torch.no_grad()
def test_the_vae_gives_the_same_pixels(original):
    folder, pipeline = original
    loaded = load_original_vae(folder, torch.float32, "cpu")
    latents = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.decode(latents).sample, pipeline.vae.decode(latents).sample)
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(video).latent_dist.mean, pipeline.vae.encode(video).latent_dist.mean)
    assert loaded.config.scaling_factor == 1.03682


@torch.no_grad()
def test_the_encoders_give_the_same_conditions(original):
    folder, pipeline = original
    loaded = load_original_encoders(folder, pipeline.vae, torch.float32)
    for pipe in (pipeline, loaded):
        pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length = 108, 32
        pipe.tokenizer_2_max_length = 16
    prompt = ['a sign says "hello" in rain']
    ours = loaded.encode_prompt(prompt, "cpu", torch.float32, batch_size=1)
    theirs = pipeline.encode_prompt(prompt, "cpu", torch.float32, batch_size=1)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    left, right = (pipe.image_encoder(pixels).last_hidden_state for pipe in (loaded, pipeline))
    assert torch.equal(left, right)
    assert loaded.scheduler.config.shift == 5.0
    assert "<color-2>" in loaded.tokenizer_2.get_added_vocab()


@pytest.mark.parametrize(
    ("name", "shift", "guidance"),
    [
        ("480p_i2v", 5.0, 6.0),
        ("480p_i2v_distilled", 5.0, 1.0),
        ("480p_i2v_step_distilled", 7.0, 1.0),
        ("720p_i2v", 7.0, 6.0),
        ("720p_t2v", 9.0, 6.0),
    ],
)
def test_each_version_has_its_schedule(name, shift, guidance):
    assert (Version(name).shift, Version(name).guidance_scale) == (shift, guidance)


def test_the_final_modulation_is_swapped_and_the_refiner_split():
    swapped = convert_transformer_tensor("final_layer.adaLN_modulation.1.bias", torch.arange(4.0))
    assert swapped["norm_out.linear.bias"].tolist() == [2.0, 3.0, 0.0, 1.0]
    key = "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight"
    parts = convert_transformer_tensor(key, torch.arange(6.0).reshape(6, 1))
    assert [part.flatten().tolist() for part in parts.values()] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


def _edit(folder, edit):
    file = next(f for f in sorted(folder.glob("*.safetensors")) if "img_in.proj.bias" in load_file(f))
    state = load_file(file)
    edit(state)
    save_file(state, file)


def _drop(state):
    del state["img_in.proj.bias"]


def _add(state):
    state["single_blocks.0.linear1.weight"] = torch.ones(1)


def _cut(state):
    state["proj.x"] = state.pop("img_in.proj.bias")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_drop, "missing x_embedder.proj.bias"),
        (_add, "not known single_blocks.0.linear1.weight"),
        (_cut, "missing x_embedder.proj.bias.*not known proj.x"),
    ],
)
def test_missing_and_left_over_tensors_are_named(broken, edit, words):
    _edit(broken / "transformer/480p_i2v", edit)
    with pytest.raises(UserError, match=words):
        load_original_transformer(broken, "480p_i2v", None, "cpu")


def test_damaged_and_missing_parts_are_named(broken):
    with pytest.raises(UserError, match="set --transformer_version to one of 480p_i2v"):
        load_original_transformer(broken, "720p_i2v", None, "cpu")
    file = broken / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_original_vae(broken, None, "cpu")
    file.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        load_original_vae(broken, None, "cpu")


def test_a_wrong_config_is_noticed_by_the_shapes(broken):
    config = broken / "vae/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))
    with pytest.raises(UserError, match=r"but the model needs"):
        load_original_vae(broken, None, "cpu")


def test_another_models_weights_are_refused(broken):
    for file in (broken / "transformer/480p_i2v").glob("*.safetensors"):
        save_file({"blocks.0.attn.weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match="not the weights of a HunyuanVideo-1.5 transformer"):
        load_original_transformer(broken, "480p_i2v", None, "cpu")


def test_a_glyph_checkpoint_with_code_in_it_is_refused(original, broken):
    class Attack:
        def __reduce__(self):
            return (open, (str(broken / "ran"), "w"))

    torch.save({"state_dict": Attack()}, broken / "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.pt")
    with pytest.raises(UserError, match="cannot be read safely"):
        load_original_encoders(broken, original[1].vae, torch.float32)
    assert not (broken / "ran").exists()
    shutil.rmtree(broken / "vision_encoder")
    with pytest.raises(UserError, match="vision encoder is missing"):
        load_original_encoders(broken, original[1].vae, torch.float32)


def test_loading_converts_one_tensor_at_a_time(original, monkeypatch):
    """The peak is one model plus one tensor: nothing holds a second state dict."""
    live, refs = [], []
    real = convert_transformer_tensor

    def watched(key, value):
        live.append(sum(ref() is not None for ref in refs))
        refs.append(weakref.ref(value))
        return real(key, value)

    monkeypatch.setattr("vflora.models.original_layout.convert_transformer_tensor", watched)
    load_original_transformer(original[0], "480p_i2v", torch.bfloat16, "cpu")
    assert len(live) > 50
    assert max(live) <= 1


def test_the_full_model_is_recognised_from_its_shapes():
    with torch.device("meta"):
        full = HunyuanVideo15Transformer3DModel()
        state = original_transformer_state(full.state_dict())
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    stored = {"ideal_resolution": "480p", "ideal_task": "i2v", "rope_dim_list": [16, 56, 56], "rope_theta": 256}
    for config in (stored, {}):
        settings = transformer_settings(shapes, config, "480p_i2v")
        assert settings == {key: full.config[key] for key in settings}


def test_a_small_transformer_is_what_the_fixture_says(original):
    assert set(original[1].transformer.state_dict()) == set(small_transformer().state_dict())
