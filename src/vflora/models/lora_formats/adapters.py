"""LoRA weights in and out of a live transformer."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vflora.errors import UserError
from vflora.models.lora_formats.weights import LoraModule, LoraWeights
from vflora.models.lora_formats.writing import peft_config

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def apply_lora(
    transformer: HunyuanVideo15Transformer3DModel,
    weights: LoraWeights,
    adapter_name: str = "default",
    scale: float = 1.0,
) -> None:
    """Adds a LoRA to a transformer as one more active adapter; those already there stay as they are.

    Args:
        transformer: the model, changed in place.
        weights: the updates.
        adapter_name: a name that no other adapter of this model has.
        scale: strength; 1 is as trained.

    Raises:
        UserError: if the LoRA does not fit this transformer, or the name is taken.
    """
    if adapter_name in getattr(transformer, "peft_config", {}):
        raise UserError(f"the transformer already has a LoRA named {adapter_name}: give this one another name.")
    _check_fit(transformer, weights)
    before = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    state: dict[str, Tensor] = {}
    for name, update in weights.modules.items():
        state[f"{name}.lora_A.weight"] = update.down
        state[f"{name}.lora_B.weight"] = update.up
    options: dict[str, Any] = {"prefix": None, "metadata": peft_config(weights.modules)}
    with warnings.catch_warnings():
        # peft warns of every second adapter; here that is what the caller asked for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        transformer.load_lora_adapter(state, adapter_name=adapter_name, **options)
    set_scale(transformer, adapter_name, scale)
    transformer.set_adapter([*before, adapter_name])


def set_scale(transformer: nn.Module, adapter_name: str, scale: float) -> None:
    """Sets the strength of one adapter; 1 is as trained.

    Raises:
        UserError: if there is no adapter of that name.
    """
    layers = [m for m in transformer.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]
    if not layers:
        raise UserError(f"the transformer has no LoRA named {adapter_name}: load it first.")
    for layer in layers:
        layer.set_scale(adapter_name, scale)


def from_transformer(transformer: nn.Module, adapter_name: str = "default") -> LoraWeights:
    """Takes an adapter out of a transformer, as copies on the CPU; sharded parameters are gathered.

    With sharded parameters every process must call it.

    Raises:
        UserError: if there is no adapter of that name.
    """
    modules: dict[str, LoraModule] = {}
    for name, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        linear: Any = layer  # peft types these as plain modules
        down = _whole(linear.lora_A[adapter_name].weight)
        alpha = float(linear.lora_alpha[adapter_name])
        if linear.use_rslora.get(adapter_name, False):
            alpha *= math.sqrt(down.shape[0])
        modules[name] = LoraModule(down, _whole(linear.lora_B[adapter_name].weight), alpha)
    if not modules:
        raise UserError(f"the transformer has no LoRA named {adapter_name}: add or load it first.")
    return LoraWeights(modules)


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.to("cpu", copy=True)


def _check_fit(transformer: nn.Module, weights: LoraWeights) -> None:
    layers = dict(transformer.named_modules())
    for name, update in weights.modules.items():
        layer: Any = layers.get(name)
        if layer is None or not hasattr(layer, "in_features"):
            raise UserError(f"this LoRA changes {name}, which the transformer does not have: use its own base model.")
        wanted = torch.Size((layer.out_features, layer.in_features))
        given = torch.Size((update.up.shape[0], update.down.shape[1]))
        if wanted != given:
            raise UserError(
                f"this LoRA is for a transformer of another size: {name} is {list(wanted)} here and "
                f"{list(given)} in the LoRA."
            )
