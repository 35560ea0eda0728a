"""Names of the transformer's modules: the original code, ComfyUI and kohya on one side, diffusers on the other.

One template table says it all; `{}` is the number of a block. A name of the other side can stand for three
diffusers modules stacked by rows (a fused query, key and value projection), which is why every lookup gives a
tuple. Source: the layout of the published HunyuanVideo-1.5 weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

SWAPPED_MODULE = "norm_out.linear"
"""The final modulation: the original keeps (shift, scale) in its rows, diffusers (scale, shift)."""

_REFINER = "txt_in.individual_token_refiner.blocks.{}."
_REFINER_DIFFUSERS = "context_embedder.token_refiner.refiner_blocks.{}."
_OUTSIDE = {
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "img_in.proj": "x_embedder.proj",
    "cond_type_embedding": "cond_type_embed",
    "final_layer.adaLN_modulation.1": SWAPPED_MODULE,
    "final_layer.linear": "proj_out",
}
_IN_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_IN_BLOCK = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q": "attn.to_q",
    "img_attn_k": "attn.to_k",
    "img_attn_v": "attn.to_v",
    "img_attn_proj": "attn.to_out.0",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q": "attn.add_q_proj",
    "txt_attn_k": "attn.add_k_proj",
    "txt_attn_v": "attn.add_v_proj",
    "txt_attn_proj": "attn.to_add_out",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
# Applied in this order to the original's templates.
_COMFYUI_SPELLING = (
    (r"_mod\.linear$", "_mod.lin"),
    (r"_attn_(qkv|proj)$", r"_attn.\1"),
    (r"mlp\.fc1$", "mlp.0"),
    (r"mlp\.fc2$", "mlp.2"),
    (r"(_in|t_embedder)\.mlp\.0$", r"\1.in_layer"),
    (r"(_in|t_embedder)\.mlp\.2$", r"\1.out_layer"),
    (r"c_embedder\.linear_1$", "c_embedder.in_layer"),
    (r"c_embedder\.linear_2$", "c_embedder.out_layer"),
)
_NUMBER = re.compile(r"(blocks[._])(\d+)([._])")


@dataclass(frozen=True)
class Naming:
    """One way of naming the transformer's modules.

    Attributes:
        table: template of a module -> templates of the diffusers modules whose rows it stacks, in order.
    """

    table: Mapping[str, tuple[str, ...]]
    _back: dict[str, tuple[str, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        back = {d: (name, row) for name, modules in self.table.items() for row, d in enumerate(modules)}
        object.__setattr__(self, "_back", back)

    def modules(self, name: str) -> tuple[str, ...] | None:
        """Returns the diffusers modules that `name` stacks by rows, or None for an unknown name."""
        template, number = _split_number(name)
        found = self.table.get(template)
        return None if found is None else tuple(module.replace("{}", number) for module in found)

    def place(self, module: str) -> tuple[str, int] | None:
        """Returns the name that holds a diffusers module, and which third of its rows; None if unknown."""
        template, number = _split_number(module)
        found = self._back.get(template)
        return None if found is None else (found[0].replace("{}", number), found[1])


def _split_number(name: str) -> tuple[str, str]:
    match = _NUMBER.search(name)
    if match is None:
        return name, ""
    return _NUMBER.sub(r"\1{}\3", name, count=1), match.group(2)


def _original_table() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {name: (module,) for name, module in _OUTSIDE.items()}
    for name, module in _IN_REFINER.items():
        table[_REFINER + name] = (_REFINER_DIFFUSERS + module,)
    table[_REFINER + "self_attn_qkv"] = tuple(f"{_REFINER_DIFFUSERS}attn.to_{x}" for x in "qkv")
    for name, module in _IN_BLOCK.items():
        table["double_blocks.{}." + name] = ("transformer_blocks.{}." + module,)
    return table


def _comfyui_table(original: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for name, modules in original.items():
        if name.endswith("_norm") or "norm1" in name or "norm2" in name:
            continue  # ComfyUI's norms hold no low-rank weights
        fused = re.sub(r"_attn_[qkv]$", "_attn_qkv", name)
        for pattern, replacement in _COMFYUI_SPELLING:
            fused = re.sub(pattern, replacement, fused)
        table[fused] = table.get(fused, ()) + modules
    return table


def _flat(table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {name.replace(".", "_"): modules for name, modules in table.items()}


ORIGINAL = Naming(_original_table())
COMFYUI = Naming(_comfyui_table(ORIGINAL.table))
KOHYA = Naming(_flat(ORIGINAL.table))
COMFYUI_FLAT = Naming(_flat(COMFYUI.table))
DIFFUSERS = Naming({m: (m,) for modules in ORIGINAL.table.values() for m in modules})
