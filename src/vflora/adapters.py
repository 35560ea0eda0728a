"""Adapters by path: a training checkpoint, a LoRA file, or several of them, onto a transformer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel

from vflora.errors import UserError
from vflora.models.lora import target_pattern
from vflora.models.lora_formats import LoraWeights, apply_lora, is_dcp, read_lora, read_reference_dcp


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter that was added.

    Attributes:
        source: the path it was read from.
        rank: of most of its layers.
        alpha: that it was trained with; it acts with alpha / rank.
        layers: how many layers it changes.
        scale: strength on top of alpha / rank.
    """

    source: str
    rank: int
    alpha: float
    layers: int
    scale: float

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return asdict(self)


def find_adapter(path: str | Path) -> Path:
    """Returns where the adapter of `path` is: the lora folder of a training checkpoint, else the path itself.

    The path itself may be a file, a folder with one, or a sharded checkpoint of the reference.

    Raises:
        UserError: if there is nothing, or a checkpoint without an adapter.
    """
    path = Path(path)
    for folder in (path, path.parent) if path.name == "dcp" else (path,):
        if (folder / "lora").is_dir():
            return folder / "lora"
    if is_dcp(path):
        return path
    if path.is_dir() and not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} holds no adapter: give a checkpoint with a lora folder (checkpoint-1000) or a LoRA file."
        )
    if not path.exists():
        raise UserError(f"There is no adapter at {path}: give a .safetensors file or a checkpoint folder.")
    return path


def declared_alpha(weights: LoraWeights) -> float:
    """Returns the alpha that the adapter was trained with.

    Files for diffusers and the original code fold alpha / rank into the weights, since their readers lose alpha;
    the header still names it.
    """
    header = weights.metadata
    return float(header["ss_network_alpha"]) if "vflora.lora_format" in header else weights.alpha


def read_adapter(path: str | Path, *, alpha: float | None = None, targets: Sequence[str] | None = None) -> LoraWeights:
    """Reads an adapter of any format, from a file, a folder or a training checkpoint.

    Args:
        path: where it is. A sharded checkpoint of the reference records no alpha; it counts as 16, its default.
        alpha: instead of the one it was trained with; the strength changes in proportion.
        targets: keep these layers only, by original or diffusers names (see `target_pattern`).

    Raises:
        UserError: if there is no adapter, or no layer of it is a target.
    """
    place = find_adapter(path)
    weights = read_reference_dcp(place) if is_dcp(place) else read_lora(place)
    modules = dict(weights.modules)
    if targets:
        pattern = re.compile(target_pattern(targets))
        modules = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        if not modules:
            raise UserError(
                f"--lora_target_modules {' '.join(targets)} selects none of the {len(weights)} layers of {path}: "
                f"it has layers such as {min(weights.modules)}."
            )
    if alpha is not None:
        factor = alpha / declared_alpha(weights)
        modules = {name: replace(module, alpha=module.alpha * factor) for name, module in modules.items()}
    return replace(weights, modules=modules)


def add_adapters(
    transformer: HunyuanVideo15Transformer3DModel,
    paths: Sequence[str | Path],
    scales: Sequence[float],
    *,
    rank: int | None = None,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
) -> tuple[AdapterInfo, ...]:
    """Adds adapters to a transformer, in place; all of them act together.

    Args:
        transformer: the base model.
        paths: of the adapters.
        scales: strength of each, or one for all.
        rank: if given, what every adapter must have.
        alpha: see `read_adapter`.
        targets: see `read_adapter`.

    Raises:
        UserError: if one cannot be read, does not fit, or has another rank.
    """
    scales = list(scales) * len(paths) if len(scales) == 1 else list(scales)
    added = []
    for index, (path, scale) in enumerate(zip(paths, scales, strict=True)):
        weights = read_adapter(path, alpha=alpha, targets=targets)
        if rank is not None and rank != weights.rank:
            raise UserError(f"{path} has rank {weights.rank}, not --lora_r {rank}: leave --lora_r out.")
        apply_lora(transformer, weights, adapter_name=f"adapter_{index}", scale=scale)
        added.append(AdapterInfo(str(path), weights.rank, declared_alpha(weights), len(weights), scale))
    return tuple(added)
