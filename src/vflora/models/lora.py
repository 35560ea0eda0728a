"""Which layers the LoRA touches, and putting it there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from peft import LoraConfig as PeftLoraConfig

from vflora.errors import UserError
from vflora.random_streams import keyed_generator

ADAPTER = "student"
"""Name of the trained adapter inside the transformer."""

_MODULES_BY_ORIGINAL_NAME = {
    "img_attn_q": r"transformer_blocks\.\d+\.attn\.to_q",
    "img_attn_k": r"transformer_blocks\.\d+\.attn\.to_k",
    "img_attn_v": r"transformer_blocks\.\d+\.attn\.to_v",
    "img_attn_proj": r"transformer_blocks\.\d+\.attn\.to_out\.0",
    "txt_attn_q": r"transformer_blocks\.\d+\.attn\.add_q_proj",
    "txt_attn_k": r"transformer_blocks\.\d+\.attn\.add_k_proj",
    "txt_attn_v": r"transformer_blocks\.\d+\.attn\.add_v_proj",
    "txt_attn_proj": r"transformer_blocks\.\d+\.attn\.to_add_out",
    "img_mod.linear": r"transformer_blocks\.\d+\.norm1\.linear",
    "txt_mod.linear": r"transformer_blocks\.\d+\.norm1_context\.linear",
    "adaLN_modulation.1": (
        r"(context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear|norm_out\.linear)"
    ),
}
_ABSENT_IN_THIS_MODEL = {
    "linear1_q",
    "linear1_k",
    "linear1_v",
    "linear2.fc",
    "linear1_mlp",
    "modulation.linear",
}
"""Single-stream blocks, which HunyuanVideo-1.5 does not have: naming them selects nothing."""

DEFAULT_TARGETS = tuple(_MODULES_BY_ORIGINAL_NAME)
"""Attention of both streams and every modulation: 543 layers and 53.4 M parameters at rank 16 in the real model."""


def target_pattern(names: Sequence[str] | None) -> str:
    """Returns the regular expression that peft matches module names with.

    Args:
        names: layers by their names in the original code (`img_attn_q`) or as ends of diffusers names
            (`attn.to_q`); None for the default set.
    """
    patterns = []
    for name in names or DEFAULT_TARGETS:
        if name in _MODULES_BY_ORIGINAL_NAME:
            patterns.append(_MODULES_BY_ORIGINAL_NAME[name])
        elif name not in _ABSENT_IN_THIS_MODEL:
            patterns.append(r"(.*\.)?" + name.replace(".", r"\."))
    return "(" + "|".join(patterns) + ")"


def add_lora(
    transformer: HunyuanVideo15Transformer3DModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str] | None,
    seed: int,
) -> None:
    """Freezes the transformer and adds a trainable LoRA in fp32, in place.

    One factor of each pair, B of linear layers, starts at zero, so the student starts as the teacher exactly (Hu et al.
    2021, arXiv 2106.09685, section 4.1). The other is drawn from a generator keyed by `seed` and the layer's name, on
    the CPU, so that it is the same numbers wherever the transformer is. A LoRA of a transformer on the meta device is
    on the CPU.

    Raises:
        UserError: if no layer matches `targets`.
    """
    transformer.requires_grad_(False)
    config = PeftLoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_pattern(targets), bias="none"
    )
    try:
        transformer.add_adapter(config, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(
            f"--lora_target_modules {' '.join(targets or ())} matches no layer of this transformer: use names such as "
            f"{', '.join(DEFAULT_TARGETS[:4])}."
        ) from error
    start: dict[str, torch.Tensor] = {}
    for name, parameter in transformer.named_parameters():
        if "lora_" not in name:
            continue
        start[name] = torch.zeros(parameter.shape, device="cpu")
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(start[name], a=math.sqrt(5), generator=keyed_generator(seed, name))
        elif "lora_embedding_B" in name:  # of embeddings, peft has the A factors start at zero
            torch.nn.init.normal_(start[name], generator=keyed_generator(seed, name))
        if not parameter.is_meta:
            start[name] = start[name].to(parameter.device)
    transformer.load_state_dict(start, strict=False, assign=True)
