"""Reads a LoRA file of any of the four formats; the keys say which one it is.

Scales follow the program each format belongs to: diffusers and the original code take alpha from the header,
ComfyUI and kohya take it from `.alpha` tensors and ignore the header; without either, the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vflora.errors import UserError
from vflora.models import original_names as names
from vflora.models.lora_formats.fusing import split, swap_halves
from vflora.models.lora_formats.weights import LoraModule, LoraWeights

LoraFormat = Literal["diffusers", "comfyui", "kohya", "original"]
FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)
CONFIG_KEY = "lora_adapter_metadata"
"""Where diffusers keeps peft's settings in the header of a file."""

_PREFIX = re.compile(
    r"^(base_model\.model\.)?(transformer\.|model\.diffusion_model\.|diffusion_model\.|lora_unet_|lora_transformer_)?"
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
_MATRIX = re.compile(r"^(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.(?!weight$)[^.]+)?\.weight$")
_FLAT_DIFFUSERS = names.Naming({m.replace(".", "_"): (m,) for m in names.DIFFUSERS.table})
_Spellings = tuple[tuple[names.Naming, LoraFormat], ...]
_DOTTED: _Spellings = (
    (names.DIFFUSERS, "diffusers"),
    (names.ORIGINAL, "original"),
    (names.COMFYUI, "comfyui"),
)
_FLAT: _Spellings = (
    (names.KOHYA, "kohya"),
    (names.COMFYUI_FLAT, "comfyui"),
    (_FLAT_DIFFUSERS, "kohya"),
)
_FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def read_lora(path: str | Path) -> LoraWeights:
    """Reads a LoRA file, or the only one in a folder.

    Args:
        path: a `.safetensors` file, or a folder that diffusers or peft wrote.

    Returns:
        The updates under diffusers names, and the header of the file.

    Raises:
        UserError: if there is no such file, it holds something else, or it was made for another model.
    """
    file = find_lora_file(Path(path))
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = dict(opened.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}): download or export it again.") from error
    beside = file.parent / "adapter_config.json"
    if CONFIG_KEY not in header and beside.is_file():
        header[CONFIG_KEY] = beside.read_text()
    return from_state_dict(tensors, header, str(file))


def find_lora_file(path: Path) -> Path:
    """Returns the LoRA file that `path` means.

    Raises:
        UserError: if there is none, or a folder holds several.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file: only that format can be read safely.")
        return path
    if not path.is_dir():
        raise UserError(f"there is no LoRA at {path}: give a .safetensors file or the folder that holds it.")
    for name in _FILE_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path} holds {len(found)} .safetensors files: name the one to read.")
    return found[0]


def recognise(keys: Iterable[str]) -> LoraFormat:
    """Says which format a file's keys are written in.

    Raises:
        UserError: if they are those of no known format.
    """
    for key in keys:
        if found := _MATRIX.match(key):
            return _resolve(found.group(1), "this file").format
    raise UserError("there are no LoRA weights in this file: its keys have no lora_A/lora_B or lora_down/lora_up.")


def from_state_dict(tensors: Mapping[str, Tensor], header: Mapping[str, str], source: str) -> LoraWeights:
    """Builds LoRA weights from named tensors of any format.

    Args:
        tensors: key -> tensor, as in a file.
        header: the file's text metadata.
        source: what to call the file in an error.

    Raises:
        UserError: as in `read_lora`.
    """
    config = _peft_config(header, source)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if found := _MATRIX.match(key):
            side = "down" if found.group(2) in ("lora_A", "lora_down") else "up"
            if side in pairs.setdefault(found.group(1), {}):
                raise UserError(f"{source} holds several adapters: save one adapter per file.")
            pairs[found.group(1)][side] = tensor
        elif not key.endswith(".alpha"):
            raise UserError(f"{source} has weights that are no plain LoRA, such as {key}: export it as LoRA only.")
    if not pairs:
        raise UserError(f"there are no LoRA weights in {source}: check that it is the right file.")
    modules: dict[str, LoraModule] = {}
    for base, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{source} has only half of the LoRA pair of {base}: export it again.")
        if pair["down"].ndim != 2 or pair["up"].ndim != 2 or pair["down"].shape[0] != pair["up"].shape[1]:
            raise UserError(f"{source} changes {base} in a way that is no Linear LoRA: leave that module out.")
        place = _resolve(base, source)
        rank = pair["down"].shape[0]
        alpha = None
        if config and place.format in ("diffusers", "original"):
            alpha = _header_alpha(config, place.name, rank)
        if alpha is None:
            stored = tensors.get(f"{base}.alpha")
            alpha = float(rank) if stored is None else float(stored)
        up = pair["up"].contiguous()
        if place.targets == (names.SWAPPED_MODULE,) and place.naming not in (names.DIFFUSERS, _FLAT_DIFFUSERS):
            up = swap_halves(up)
        update = LoraModule(pair["down"].contiguous(), up, alpha)
        parts = split(update, len(place.targets)) if len(place.targets) > 1 else (update,)
        modules |= {name: part for name, part in zip(place.targets, parts, strict=True) if part is not None}
    kept = {key: value for key, value in header.items() if key not in (CONFIG_KEY, "format")}
    return LoraWeights(modules, kept)


class _Place(NamedTuple):
    name: str
    naming: names.Naming
    format: LoraFormat
    targets: tuple[str, ...]


def _resolve(base: str, source: str) -> _Place:
    match = _PREFIX.match(base)
    prefix = match.group(0) if match else ""
    name = base.removeprefix(prefix)
    for naming, format in _FLAT if prefix.endswith(_FLAT_PREFIXES) else _DOTTED:
        targets = naming.modules(name)
        if targets is not None:
            return _Place(name, naming, "comfyui" if "diffusion_model." in prefix else format, targets)
    raise UserError(f"{source} is a LoRA for another model: HunyuanVideo-1.5 has no module {name}.")


def _peft_config(header: Mapping[str, str], source: str) -> dict[str, Any]:
    if CONFIG_KEY not in header:
        return {}
    try:
        loaded = json.loads(header[CONFIG_KEY])
    except json.JSONDecodeError as error:
        raise UserError(f"the adapter settings in the header of {source} are no JSON: export it again.") from error
    config = {key.removeprefix("transformer."): value for key, value in loaded.items()}
    if config.get("use_dora"):
        raise UserError(f"{source} is a DoRA adapter, which has no lossless LoRA form: train with use_dora off.")
    return config


def _header_alpha(config: Mapping[str, Any], name: str, rank: int) -> float | None:
    pattern = config.get("alpha_pattern") or {}
    alpha = pattern.get(get_pattern_key(list(pattern), name), config.get("lora_alpha"))
    if alpha is None:
        return None
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
