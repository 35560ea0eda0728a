import itertools
import json

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vflora.errors import UserError
from vflora.models.lora_formats import (
    FORMATS,
    LoraModule,
    LoraWeights,
    apply_lora,
    build_header,
    from_transformer,
    read_lora,
    recognise,
    set_scale,
    to_state_dict,
    write_lora,
)
from vflora.models.lora_formats.fusing import fuse, split
from vflora.models.random_weights import randomise_lora, small_transformer

REFINER = "context_embedder.token_refiner.refiner_blocks.0."
DEFAULT_TARGETS = (
    r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm1\.linear"
    r"|norm1_context\.linear)|context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear"
    r"|norm_out\.linear)"
)
ALL_LINEAR = (
    r"(transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|norm1\.linear"
    r"|norm1_context\.linear|ff\.net\.(0\.proj|2)|ff_context\.net\.(0\.proj|2))"
    r"|context_embedder\.token_refiner\.refiner_blocks\.\d+\.(norm_out\.linear|attn\.(to_[qkv]|to_out\.0))"
    r"|context_embedder\.proj_in|time_embed\.timestep_embedder\.linear_[12]|norm_out\.linear|proj_out)"
)


def _adapted(targets=DEFAULT_TARGETS, rank=4, alpha=8, rank_pattern=None, seed=1):
    transformer = small_transformer()
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, rank_pattern=rank_pattern or {})
    )
    randomise_lora(transformer.named_parameters(), std=0.1, seed=seed)
    return transformer


def _inputs():
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
    }


@torch.no_grad()
def _output(transformer):
    return transformer(**_inputs()).sample


def _assert_same_deltas(left, right, tolerance=1e-12):
    assert set(left.modules) == set(right.modules)
    for name, update in left.modules.items():
        torch.testing.assert_close(right.modules[name].delta(), update.delta(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("targets", [DEFAULT_TARGETS, ALL_LINEAR], ids=["default targets", "all linear"])
@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_deltas_and_ranks_survive_a_trip_through_any_two_formats(tmp_path, targets, first, second):
    weights = from_transformer(_adapted(targets))
    there = read_lora(write_lora(weights, tmp_path / "there.safetensors", first))
    back = read_lora(write_lora(there, tmp_path / "back.safetensors", second))
    _assert_same_deltas(weights, back)
    assert {update.rank for update in back.modules.values()} == {4}


@pytest.mark.parametrize("format", FORMATS)
def test_the_model_gives_the_same_output_from_every_format(tmp_path, format):
    transformer = _adapted(ALL_LINEAR)
    expected = _output(transformer)
    loaded = small_transformer()
    assert not torch.equal(_output(loaded), expected)
    apply_lora(loaded, read_lora(write_lora(from_transformer(transformer), tmp_path, format)))
    torch.testing.assert_close(_output(loaded), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["default", None])
def test_diffusers_itself_reads_the_diffusers_export(tmp_path, prefix):
    transformer = _adapted(rank_pattern={r"^norm_out\.linear": 2})
    file = write_lora(from_transformer(transformer), tmp_path / "lora.safetensors", "diffusers")
    loaded = small_transformer()
    if prefix is None:  # a reader that drops the header gets the right scale too
        state = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
        loaded.load_lora_adapter(state, prefix=None, adapter_name="a")
    else:
        loaded.load_lora_adapter(str(file), use_safetensors=True, adapter_name="a")
    torch.testing.assert_close(_output(loaded), _output(transformer), rtol=0, atol=1e-6)


def test_what_diffusers_writes_is_read_with_its_alpha(tmp_path):
    transformer = _adapted(alpha=3)
    transformer.save_lora_adapter(tmp_path, adapter_name="default")
    _assert_same_deltas(from_transformer(transformer), read_lora(tmp_path))


def test_a_file_of_the_reference_takes_alpha_from_its_header(tmp_path):
    down, up = torch.randn(4, 32), torch.randn(64, 4)
    config = {"r": 4, "lora_alpha": 16, "alpha_pattern": {"final_layer.adaLN_modulation.1": 8}}
    tensors = {
        "double_blocks.0.img_attn_q.lora_A.weight": torch.eye(4, 32),
        "double_blocks.0.img_attn_q.lora_B.weight": torch.ones(32, 4),
        "final_layer.adaLN_modulation.1.lora_A.weight": down,
        "final_layer.adaLN_modulation.1.lora_B.weight": up,
    }
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    weights = read_lora(tmp_path / "a.safetensors")
    assert weights.modules["transformer_blocks.0.attn.to_q"].scale == 4.0
    modulation = weights.modules["norm_out.linear"]
    assert modulation.scale == 2.0
    assert torch.equal(modulation.up, torch.cat([up[32:], up[:32]]))


class _OriginalTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Layers under the names of the original code, in a diffusers model: what the reference exports adapters of."""

    @register_to_config
    def __init__(self, width: int = 32):
        super().__init__()
        layers = {
            name: nn.Linear(width, width)
            for name in (
                *(f"{stream}_attn_{part}" for stream in ("img", "txt") for part in ("q", "k", "v", "proj")),
                "img_mlp_fc1",  # not a target
            )
        }
        layers |= {f"{stream}_mod": nn.ModuleDict({"linear": nn.Linear(width, 6 * width)}) for stream in ("img", "txt")}

        def modulation():
            return nn.ModuleDict({"adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})

        self.double_blocks = nn.ModuleList([nn.ModuleDict(layers)])
        self.final_layer = modulation()
        refiner = nn.ModuleDict({"blocks": nn.ModuleList([modulation()])})
        self.txt_in = nn.ModuleDict({"individual_token_refiner": refiner})


def test_the_references_exported_adapter_is_read(tmp_path):
    """Written by the call that its export makes, with its default targets."""
    transformer = _OriginalTransformer()
    targets = [f"{stream}_attn_{part}" for stream in ("img", "txt") for part in ("q", "k", "v", "proj")]
    targets += ["linear1_q", "linear2.fc", "img_mod.linear", "txt_mod.linear", "modulation.linear"]
    targets += ["adaLN_modulation.1"]
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets, bias="none", task_type="FEATURE_EXTRACTION")
    transformer.add_adapter(config, adapter_name="default")
    randomise_lora(transformer.named_parameters(), std=1.0)
    transformer.save_lora_adapter(save_directory=tmp_path, adapter_name="default", safe_serialization=True)
    expected = {
        name: layer.get_delta_weight("default").double()
        for name, layer in transformer.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(expected) == 12
    weights = read_lora(tmp_path)
    assert weights.alpha == 16.0
    tensors, _ = to_state_dict(weights, "original")
    for name, delta in expected.items():
        down, up = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(up @ down, delta, rtol=1e-5, atol=1e-6)
    shift, scale = expected["final_layer.adaLN_modulation.1"].chunk(2)
    found = weights.modules["norm_out.linear"].delta()
    torch.testing.assert_close(found, torch.cat([scale, shift]), rtol=1e-5, atol=1e-6)


def test_a_peft_folder_with_its_own_settings_file_is_read(tmp_path):
    tensors = {
        "base_model.model.double_blocks.1.txt_mod.linear.lora_A.weight": torch.ones(2, 32),
        "base_model.model.double_blocks.1.txt_mod.linear.lora_B.weight": torch.ones(192, 2),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_rslora": True}))
    update = read_lora(tmp_path).modules["transformer_blocks.1.norm1_context.linear"]
    assert update.scale == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize(
    ("key", "alpha", "scale"),
    [
        ("diffusion_model.double_blocks.0.img_attn.proj", 2.0, 0.5),
        ("diffusion_model.double_blocks.0.img_attn.proj", None, 1.0),
        ("lora_unet_double_blocks_0_img_attn_proj", 8.0, 2.0),
    ],
)
def test_comfyui_and_kohya_take_alpha_from_tensors_and_ignore_the_header(tmp_path, key, alpha, scale):
    tensors = {f"{key}.lora_down.weight": torch.ones(4, 32), f"{key}.lora_up.weight": torch.ones(32, 4)}
    if alpha is not None:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    header = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 400})}
    save_file(tensors, tmp_path / "a.safetensors", header)
    assert read_lora(tmp_path).modules["transformer_blocks.0.attn.to_out.0"].scale == scale


def _comfyui_weights(state):
    """The fused weights ComfyUI holds, spelled out here independently of the package's tables."""
    fused = {}
    for i in range(2):
        here, there = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for stream, parts in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            fused[f"{there}{stream}_attn.qkv"] = torch.cat([state[f"{here}attn.{part}.weight"] for part in parts])
        fused[f"{there}img_attn.proj"] = state[f"{here}attn.to_out.0.weight"]
        fused[f"{there}txt_attn.proj"] = state[f"{here}attn.to_add_out.weight"]
        fused[f"{there}img_mod.lin"] = state[f"{here}norm1.linear.weight"]
        fused[f"{there}txt_mod.lin"] = state[f"{here}norm1_context.linear.weight"]
    refiner = "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1"
    fused[refiner] = state[f"{REFINER}norm_out.linear.weight"]
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    fused["final_layer.adaLN_modulation.1"] = torch.cat([shift, scale])
    return fused


def test_merging_in_comfyui_equals_merging_in_diffusers(tmp_path):
    """ComfyUI's rule: weight + alpha / rank * up @ down, by the name of the fused module."""
    base = {key: value.double() for key, value in small_transformer().state_dict().items()}
    weights = from_transformer(_adapted(rank_pattern={r"^transformer_blocks\.0\.attn\.to_k": 2}))
    merged = dict(base)
    for name, update in weights.modules.items():
        merged[f"{name}.weight"] = base[f"{name}.weight"] + update.delta()
    expected = _comfyui_weights(merged)
    file = load_file(write_lora(weights, tmp_path / "a.safetensors", "comfyui"))
    for name, weight in _comfyui_weights(base).items():
        key = f"diffusion_model.{name}"
        down, up = (file.pop(f"{key}.lora_{side}.weight").double() for side in ("down", "up"))
        weight = weight + file.pop(f"{key}.alpha").item() / down.shape[0] * up @ down
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    assert not file  # every tensor found its module


def test_comfyui_export_is_what_comfyui_matches():
    tensors, _ = to_state_dict(from_transformer(_adapted()), "comfyui")
    base = "diffusion_model.double_blocks.1.img_attn.qkv"
    assert tensors[f"{base}.lora_down.weight"].shape == (12, 32)
    assert tensors[f"{base}.lora_up.weight"].shape == (96, 12)
    assert tensors[f"{base}.alpha"].item() == 24.0
    assert not any("img_attn_q" in key or "lora_A" in key for key in tensors)


def test_kohya_export_keeps_the_projections_apart():
    tensors, _ = to_state_dict(from_transformer(_adapted()), "kohya")
    assert tensors["lora_unet_double_blocks_0_txt_attn_v.lora_up.weight"].shape == (32, 4)
    assert tensors["lora_unet_double_blocks_0_txt_attn_v.alpha"].item() == 8.0


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_recognised_by_their_keys(format):
    tensors, _ = to_state_dict(from_transformer(_adapted()), format)
    assert recognise(tensors) == format


def test_flat_comfyui_names_are_read(tmp_path):
    tensors, _ = to_state_dict(weights := from_transformer(_adapted()), "comfyui")
    flat = {}
    for key, value in tensors.items():
        name, dot, suffix = key.removeprefix("diffusion_model.").rpartition(".lora" if ".lora" in key else ".alpha")
        flat["lora_unet_" + name.replace(".", "_") + dot + suffix] = value
    save_file(flat, tmp_path / "a.safetensors")
    _assert_same_deltas(weights, read_lora(tmp_path))


def _update(rank, alpha, height=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LoraModule(
        torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator), alpha
    )


@pytest.mark.parametrize(
    "parts",
    [
        (_update(2, 2.0), _update(2, 2.0, seed=1), _update(2, 2.0, seed=2)),
        (_update(1, 4.0), _update(2, 3.0, seed=1), _update(3, 7.0, seed=2)),
        (_update(2, 2.0), None, _update(2, 2.0, seed=2)),
        (None, _update(3, 1.0), None),
    ],
    ids=["equal", "unequal ranks and alphas", "one missing", "two missing"],
)
def test_fused_parts_come_apart_at_their_own_rank(parts):
    back = split(fuse(parts), 3)
    for part, again in zip(parts, back, strict=True):
        if part is None:
            assert again is None
            continue
        assert again.rank == part.rank
        torch.testing.assert_close(again.delta(), part.delta(), rtol=0, atol=1e-6)


def test_an_update_trained_fused_keeps_its_rank_there_and_back():
    fused = _update(3, 6.0, height=18)
    parts = split(fused, 3)
    assert [part.rank for part in parts] == [3, 3, 3]
    torch.testing.assert_close(torch.cat([part.delta() for part in parts]), fused.delta(), rtol=0, atol=0)
    again = fuse(parts)
    assert again.rank == 3
    assert torch.equal(again.up, fused.up)


def test_baking_alpha_never_rounds():
    exact = LoraModule(torch.randn(4, 5).bfloat16(), torch.randn(6, 4).bfloat16(), 8.0)
    assert exact.with_scale_one().up.dtype == torch.bfloat16
    odd = LoraModule(exact.down, exact.up, 3.0 * 0.7)
    baked = odd.with_scale_one()
    assert baked.scale == 1.0
    assert baked.up.dtype == torch.float32
    torch.testing.assert_close(baked.delta(), odd.delta(), rtol=1e-6, atol=1e-7)


def test_several_loras_add_up_each_at_its_own_scale():
    first, second = from_transformer(_adapted(seed=1)), from_transformer(_adapted(ALL_LINEAR, seed=2))
    transformer = small_transformer()
    apply_lora(transformer, first, "first", 0.5)
    apply_lora(transformer, second, "second", 2.0)
    merged = small_transformer()
    for weights, scale in ((first, 0.5), (second, 2.0)):
        for name, update in weights.modules.items():
            merged.get_submodule(name).weight.data += (scale * update.delta()).float()
    torch.testing.assert_close(_output(transformer), _output(merged), rtol=0, atol=1e-5)
    set_scale(transformer, "first", 0.0)
    set_scale(transformer, "second", 0.0)
    torch.testing.assert_close(_output(transformer), _output(small_transformer()), rtol=0, atol=0)


def test_the_header_tells_what_the_file_is(tmp_path):
    header = build_header(
        title="Mudkip",
        base_model="480p_i2v",
        recipe={"lambda_id": 0.6},
        characters=["mudkip", "mew"],
        thumbnail=Image.new("RGB", (640, 480), "red"),
    )
    file = write_lora(from_transformer(_adapted()), tmp_path / "a.safetensors", "comfyui", header)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.architecture"].endswith("/lora")
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert metadata["modelspec.trigger_phrase"] == "mudkip, mew"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    assert json.loads(metadata["vflora.recipe"]) == {"lambda_id": 0.6}
    again = write_lora(read_lora(file), tmp_path / "b.safetensors", "kohya")
    with safe_open(again, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "Mudkip"
        assert opened.metadata()["vflora.lora_format"] == "kohya"


def test_the_alpha_of_the_training_run_stays_in_the_header_when_it_is_folded_in(tmp_path):
    first = write_lora(from_transformer(_adapted(alpha=8)), tmp_path / "a.safetensors", "diffusers")
    second = write_lora(read_lora(first), tmp_path / "b.safetensors", "original")
    assert read_lora(second).metadata["ss_network_alpha"] == "8.0"


def _save(path, keys):
    save_file({key: torch.ones(2, 2) for key in keys}, path / "a.safetensors")
    return path


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["weight"], "no plain LoRA"),
        (["single_blocks.0.linear1.lora_A.weight", "single_blocks.0.linear1.lora_B.weight"], "another model"),
        (["proj_out.lora_A.weight"], "only half"),
        (["proj_out.lora_A.a.weight", "proj_out.lora_A.b.weight"], "several adapters"),
        (["proj_out.lora_A.weight", "proj_out.lora_B.weight", "proj_out.lora_B.bias"], "no plain LoRA"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        read_lora(_save(tmp_path, keys))


def test_convolution_updates_are_refused(tmp_path):
    shapes = {
        "lora_unet_img_in_proj.lora_down.weight": (2, 9, 1, 1, 1),
        "lora_unet_img_in_proj.lora_up.weight": (32, 2),
    }
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no Linear LoRA"):
        read_lora(tmp_path)


def test_missing_and_unsafe_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no LoRA at"):
        read_lora(tmp_path / "nowhere")
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"not a \.safetensors"):
        read_lora(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"nothing useful")
    with pytest.raises(UserError, match="not a whole safetensors"):
        read_lora(tmp_path / "b.safetensors")


def test_a_lora_of_another_size_or_name_is_refused():
    weights = from_transformer(_adapted())
    with pytest.raises(UserError, match="another size"):
        apply_lora(small_transformer(heads=4), weights)
    with pytest.raises(UserError, match="does not have"):
        apply_lora(small_transformer(layers=1), weights)
    transformer = small_transformer()
    apply_lora(transformer, weights)
    with pytest.raises(UserError, match="already has"):
        apply_lora(transformer, weights)
    with pytest.raises(UserError, match="no LoRA named"):
        set_scale(transformer, "other", 1.0)
    with pytest.raises(UserError, match="leave it out"):
        write_lora(LoraWeights({"something": _update(2, 2.0)}), "never.safetensors", "kohya")
