import re

import pytest
import torch
from diffusers import HunyuanVideo15Transformer3DModel

from vflora.models import original_names as names
from vflora.models.lora import target_pattern
from vflora.models.random_weights import small_transformer


def _modules(state_dict):
    return {key.rpartition(".")[0] for key in state_dict}


def test_every_module_of_the_transformer_has_one_original_name():
    modules = _modules(small_transformer(layers=3, use_meanflow=True).state_dict())
    places = {module: names.ORIGINAL.place(module) for module in modules}
    assert None not in places.values()
    for module, (name, row) in places.items():
        assert names.ORIGINAL.modules(name)[row] == module


def test_every_default_target_of_the_full_model_has_a_name_in_every_program():
    with torch.device("meta"):
        full = HunyuanVideo15Transformer3DModel()
    targets = [name for name, _ in full.named_modules() if re.fullmatch(target_pattern(None), name)]
    assert len(targets) == 543
    for naming in (names.ORIGINAL, names.KOHYA, names.COMFYUI):
        assert len({naming.place(name) for name in targets} - {None}) == 543


def test_the_full_model_has_as_many_names_as_the_published_weights():
    expanded = {
        name.replace("{}", str(i))
        for name in names.ORIGINAL.table
        for i in range(54 if name.startswith("double_blocks") else 2 if "{}" in name else 1)
    }
    assert len(expanded) == 1005 + 2  # 1005 modules kept whole, and the fused projections of two refiner blocks


@pytest.mark.parametrize(
    ("naming", "name", "modules"),
    [
        (names.ORIGINAL, "double_blocks.53.txt_attn_q", ("transformer_blocks.53.attn.add_q_proj",)),
        (names.ORIGINAL, "double_blocks.10.img_mlp.fc1", ("transformer_blocks.10.ff.net.0.proj",)),
        (names.ORIGINAL, "final_layer.adaLN_modulation.1", ("norm_out.linear",)),
        (names.ORIGINAL, "time_r_in.mlp.2", ("time_embed.timestep_embedder_r.linear_2",)),
        (names.COMFYUI, "double_blocks.7.img_mod.lin", ("transformer_blocks.7.norm1.linear",)),
        (
            names.COMFYUI,
            "double_blocks.7.txt_attn.qkv",
            tuple(f"transformer_blocks.7.attn.add_{x}_proj" for x in "qkv"),
        ),
        (
            names.COMFYUI,
            "txt_in.individual_token_refiner.blocks.1.self_attn.qkv",
            tuple(f"context_embedder.token_refiner.refiner_blocks.1.attn.to_{x}" for x in "qkv"),
        ),
        (names.COMFYUI, "txt_in.c_embedder.out_layer", (
            "context_embedder.time_text_embed.text_embedder.linear_2",
        )),
        (names.KOHYA, "double_blocks_12_img_attn_proj", ("transformer_blocks.12.attn.to_out.0",)),
    ],
)  # fmt: skip
def test_names_of_each_program(naming, name, modules):
    assert naming.modules(name) == modules
    assert naming.place(modules[-1]) == (name, len(modules) - 1)


def test_flattened_names_stay_different():
    assert len(names.KOHYA.table) == len(names.ORIGINAL.table)
    assert len(names.COMFYUI_FLAT.table) == len(names.COMFYUI.table)


@pytest.mark.parametrize("name", ["single_blocks.0.linear1", "double_blocks.0.nothing", "transformer.wte"])
def test_unknown_names_are_none(name):
    assert names.ORIGINAL.modules(name) is None
    assert names.DIFFUSERS.place(name) is None
