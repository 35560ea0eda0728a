"""`vflora export`: the adapter of a checkpoint as a file for diffusers, ComfyUI, kohya or the original code.

Rank, alpha and layers come from the checkpoint: nobody types them twice. Flags may still override them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from vflora.adapters import find_adapter, read_adapter
from vflora.atomic import require_writable
from vflora.checkpoint import verify_checkpoint
from vflora.config import TORCH_DTYPES, Precision, require
from vflora.distributed.launch import is_first
from vflora.errors import UserError
from vflora.inference import open_image
from vflora.models.lora_formats import LoraFormat, LoraModule, LoraWeights, build_header, write_lora
from vflora.previews import Preview, find_previews, student_frame

log = logging.getLogger(__name__)

_ALPHA_IN_HEADER_ONLY: tuple[LoraFormat, ...] = ("diffusers", "original")


@dataclass(frozen=True)
class ExportConfig:
    """Which adapter to write, where, and for whom."""

    checkpoint_path: Path
    """A training checkpoint (checkpoint-1000), or a LoRA file of any format."""
    output_dir: Path
    """Folder for the adapter."""
    format: LoraFormat = "diffusers"
    """diffusers, comfyui, kohya or original: the program that will read it."""
    model_path: str | None = None
    """Base model to name in the file's header; without it, what the checkpoint says."""
    transformer_version: str = "480p_i2v"
    """Transformer to name beside --model_path."""
    dtype: Precision = "bf16"
    """Precision of the written weights; training keeps fp32."""
    lora_r: int | None = None
    """Rank; read from the checkpoint. A smaller one compresses: the nearest update of that rank is written."""
    lora_alpha: float | None = None
    """Alpha; read from the checkpoint. Another one changes the strength in proportion."""
    lora_dropout: float = 0.0
    """Accepted for old command lines: an adapter file has no dropout."""
    lora_target_modules: list[str] | None = None
    """Write these layers only; without it, all that were trained."""
    name: str | None = None
    """Title in the header, and name of files that are not diffusers'; without it, the name of --output_dir."""
    author: str | None = None
    """Author in the header."""
    characters: list[str] | None = None
    """Names to use in a prompt, for the header."""
    thumbnail: Path | None = None
    """Picture for the header, which model browsers show; without it, a frame of the best clip of the run's newest
    validation, if there was one."""

    def __post_init__(self) -> None:
        require(self.lora_r is None or self.lora_r >= 1, "--lora_r must be at least 1.")
        require(self.lora_alpha is None or self.lora_alpha > 0, "--lora_alpha must be positive.")


def run(config: ExportConfig) -> Path | None:
    """Writes the adapter.

    Returns:
        The file; None in the processes of a launcher other than the first, which have nothing to do.

    Raises:
        UserError: if there is no adapter, a checkpoint file is damaged, an override does not fit, or a file is in the
            place of the folder.
    """
    if not is_first():
        return None
    require_writable(config.output_dir, "--output_dir")
    if (config.checkpoint_path / "manifest.json").is_file():
        verify_checkpoint(config.checkpoint_path)
    weights = read_adapter(
        find_adapter(config.checkpoint_path), alpha=config.lora_alpha, targets=config.lora_target_modules
    )
    if config.lora_r is not None and config.lora_r != weights.rank:
        if config.lora_r > weights.rank:
            raise UserError(
                f"{config.checkpoint_path} was trained with rank {weights.rank}, and --lora_r {config.lora_r} cannot "
                f"add to it: leave --lora_r out, or give at most {weights.rank}."
            )
        weights, lost = reduce_rank(weights, config.lora_r)
        log.info("rank %d keeps the update up to a relative error of %.3g", config.lora_r, lost)
    name = config.name or config.output_dir.resolve().name
    target = (
        config.output_dir if config.format == "diffusers" else config.output_dir / f"{name}-{config.format}.safetensors"
    )
    file = write_lora(in_precision(weights, config), target, config.format, _header(config, weights, name))
    log.info(
        "wrote %s: rank %d, alpha %g, %d layers, %.1f MB",
        file,
        weights.rank,
        weights.alpha,
        len(weights),
        file.stat().st_size / 1e6,
    )
    return file


def reduce_rank(weights: LoraWeights, rank: int) -> tuple[LoraWeights, float]:
    """Replaces every update by the nearest one of lower rank (Eckart and Young 1936), at the same scale.

    Args:
        weights: the updates.
        rank: what no update shall exceed.

    Returns:
        The new updates, and the Frobenius norm of what was lost over that of the whole.
    """
    modules, lost, whole = {}, 0.0, 0.0
    for name, module in weights.modules.items():
        # The product is never formed: its singular values are those of the small matrix between the two bases.
        left, left_triangle = torch.linalg.qr(module.up.double())
        right, right_triangle = torch.linalg.qr(module.down.double().T)
        u, values, v = torch.linalg.svd(left_triangle @ right_triangle.T)
        kept = min(rank, len(values))
        root = values[:kept].sqrt()
        modules[name] = LoraModule(
            down=(root[:, None] * (v[:kept] @ right.T)).to(module.down.dtype),
            up=(left @ u[:, :kept] * root).to(module.up.dtype),
            alpha=module.scale * kept,
        )
        lost += (values[kept:] * module.scale).square().sum().item()
        whole += (values * module.scale).square().sum().item()
    return replace(weights, modules=modules), (lost / whole) ** 0.5 if whole else 0.0


def in_precision(weights: LoraWeights, config: ExportConfig) -> LoraWeights:
    """Rounds the weights to `config.dtype`, once.

    Formats without an alpha of their own fold the scale into the weights. Where that product is not exact in
    `config.dtype`, it is taken here, before the rounding.
    """
    dtype = TORCH_DTYPES[config.dtype]
    modules = {}
    for name, module in weights.modules.items():
        rounded = LoraModule(module.down.to(dtype), module.up.to(dtype), module.alpha)
        if config.format in _ALPHA_IN_HEADER_ONLY and rounded.with_scale_one().up.dtype != dtype:
            folded = LoraModule(module.down.float(), module.up.float(), module.alpha).with_scale_one()
            rounded = LoraModule(folded.down.to(dtype), folded.up.to(dtype), folded.alpha)
        modules[name] = rounded
    return replace(weights, modules=modules)


def _header(config: ExportConfig, weights: LoraWeights, name: str) -> dict[str, str]:
    """What the flags say wins; what they leave open stays as the checkpoint has it."""
    base = weights.metadata.get("vflora.base_model", "HunyuanVideo-1.5")
    return build_header(
        title=name,
        base_model=base if config.model_path is None else f"{config.model_path} {config.transformer_version}",
        characters=config.characters or (),
        thumbnail=_thumbnail(config),
        author=config.author,
    )


def _thumbnail(config: ExportConfig) -> Image.Image | None:
    if config.thumbnail is not None:
        return open_image(config.thumbnail, "--thumbnail")
    step = re.fullmatch(r"checkpoint-(\d+)", config.checkpoint_path.name)
    if step is None:
        return None
    previews = [p for p in find_previews(config.checkpoint_path.parent) if p.step <= int(step.group(1))]
    return student_frame(max(previews, key=_merit)) if previews else None


def _merit(preview: Preview) -> tuple[int, float]:
    return preview.step, preview.sample.numbers.get("val/student_cosine_last_quarter", -1.0)
