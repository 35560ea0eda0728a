"""Writes LoRA weights in any of the four formats, so that the program each belongs to reads the right scale."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vflora.errors import UserError
from vflora.models import original_names as names
from vflora.models.lora_formats.fusing import fuse, swap_halves
from vflora.models.lora_formats.header import file_header
from vflora.models.lora_formats.reading import CONFIG_KEY, FORMATS, LoraFormat
from vflora.models.lora_formats.weights import LoraModule, LoraWeights

_NAMINGS: Mapping[LoraFormat, names.Naming] = {
    "diffusers": names.DIFFUSERS,
    "comfyui": names.COMFYUI,
    "kohya": names.KOHYA,
    "original": names.ORIGINAL,
}
_PREFIXES: Mapping[LoraFormat, str] = {
    "diffusers": "transformer.",
    "comfyui": "diffusion_model.",
    "kohya": "lora_unet_",
    "original": "",
}


def write_lora(
    weights: LoraWeights,
    path: str | Path,
    format: LoraFormat,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a LoRA file; the weight deltas stay what they are.

    Args:
        weights: the updates; their header is carried over.
        path: a `.safetensors` file, or a folder to put `pytorch_lora_weights.safetensors` into.
        format: whose names and whose way of writing alpha.
        metadata: more header entries (see `build_header`); they win over those of `weights`.

    Returns:
        The file written.

    Raises:
        UserError: if the format is unknown, a module has no name in it, or the disk does not take the file.
    """
    file = lora_file(path)
    tensors, config = to_state_dict(weights, format)
    header = {**weights.metadata, **(metadata or {}), **file_header(weights, tensors, format), "format": "pt"}
    if config is not None:
        header[CONFIG_KEY] = json.dumps(config, indent=2, sort_keys=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + ".tmp")
    try:
        save_file(tensors, unfinished, metadata=header)
    except SafetensorError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error}): make room there, or choose another place.") from error
    unfinished.chmod(0o644)  # safetensors writes for its owner alone; this file is made to be shared
    os.replace(unfinished, file)
    return file


def lora_file(path: str | Path) -> Path:
    """Returns the file that `write_lora` writes: `path`, or where that is a folder one of diffusers' name in it."""
    return Path(path) if Path(path).suffix == ".safetensors" else Path(path) / "pytorch_lora_weights.safetensors"


def to_state_dict(weights: LoraWeights, format: LoraFormat) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Names the tensors the way `format` does.

    Returns:
        The tensors, and peft's settings for the header (None where the format has no use for them).

    Raises:
        UserError: if the format is unknown or a module has no name in it.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format} is unknown: use one of {', '.join(FORMATS)}.")
    placed = _placed(weights, format)
    prefix = _PREFIXES[format]
    tensors: dict[str, Tensor] = {}
    if format in ("comfyui", "kohya"):
        for name, update in placed.items():
            tensors[f"{prefix}{name}.lora_down.weight"] = _own(update.down)
            tensors[f"{prefix}{name}.lora_up.weight"] = _own(update.up)
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(update.alpha))
        return tensors, None
    baked = {name: update.with_scale_one() for name, update in placed.items()}
    for name, update in baked.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = _own(update.down)
        tensors[f"{prefix}{name}.lora_B.weight"] = _own(update.up)
    return tensors, {prefix + key: value for key, value in peft_config(baked).items()}


def peft_config(modules: Mapping[str, LoraModule]) -> dict[str, Any]:
    """Returns the few `peft.LoraConfig` arguments that describe these modules.

    Patterns are anchored with `^`: peft matches them at any dot otherwise, and "norm_out.linear" is also the
    end of the name of every refiner block's modulation.
    """
    rank = Counter(m.rank for m in modules.values()).most_common(1)[0][0]
    alpha = Counter(m.alpha for m in modules.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": m.rank for name, m in modules.items() if m.rank != rank},
        "alpha_pattern": {f"^{name}": m.alpha for name, m in modules.items() if m.alpha != alpha},
        "target_modules": sorted(modules),
        "bias": "none",
    }


def _placed(weights: LoraWeights, format: LoraFormat) -> dict[str, LoraModule]:
    naming = _NAMINGS[format]
    placed: dict[str, list[LoraModule | None]] = {}
    for module, update in weights.modules.items():
        place = naming.place(module)
        if place is None:
            raise UserError(f"the {format} format has no name for {module}: leave it out of --lora_target_modules.")
        name, row = place
        if module == names.SWAPPED_MODULE and format != "diffusers":
            update = LoraModule(update.down, swap_halves(update.up), update.alpha)
        parts = placed.setdefault(name, [None] * len(naming.modules(name) or ()))
        parts[row] = update
    return {name: (parts[0] or fuse(parts)) if len(parts) == 1 else fuse(parts) for name, parts in placed.items()}


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share storage, as the shared `down` of split projections does
    return tensor.detach().to("cpu").contiguous().clone()
