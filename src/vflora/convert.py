"""`vflora convert`: the original layout of HunyuanVideo-1.5 as a diffusers folder."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from vflora.atomic import require_space
from vflora.config import TORCH_DTYPES, Precision
from vflora.errors import UserError
from vflora.models.original_encoders import PARTS, load_original_encoders
from vflora.models.original_layout import is_original_layout, load_original_transformer, load_original_vae

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and where to."""

    pipeline_dir: Path
    """Folder in the original layout, with transformer/, vae/, text_encoder/ and vision_encoder/ in it."""
    output_dir: Path
    """New folder for the diffusers pipeline."""
    transformer_version: str = "480p_i2v"
    """Which transformer to convert: 480p_i2v, 480p_i2v_distilled, 480p_i2v_step_distilled, 720p_i2v, ..."""
    dtype: Precision = "bf16"
    """Precision of the transformer and the encoders; the VAE keeps its own."""


def run(config: ConvertConfig) -> None:
    """Converts one component after the other, so that only one of the big ones is in memory.

    Raises:
        UserError: if the source is not complete, the target is not empty, or the disk is too small.
    """
    source, target = config.pipeline_dir, config.output_dir
    if not is_original_layout(source):
        raise UserError(
            f"{source} is not in the original layout: it needs transformer/{config.transformer_version}/*.safetensors, "
            "and a folder with a model_index.json needs no conversion."
        )
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty: give --output_dir a new folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    advice = "free some space, or choose another disk with --output_dir."
    require_space(target.parent, needed_bytes(source, config.transformer_version), advice)
    unfinished = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    _write(config, unfinished)
    if target.exists():
        target.rmdir()
    unfinished.rename(target)
    log.info("wrote %s: use it as --pipeline_dir %s", target, target)


def needed_bytes(source: Path, version: str) -> int:
    """Returns the size of the files that a conversion reads, which is at least the size of what it writes."""
    folders = [source / "transformer" / version, source / "vae", *(source / place for place in PARTS.values())]
    return sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())


def _write(config: ConvertConfig, folder: Path) -> None:
    dtype = TORCH_DTYPES[config.dtype]
    version = config.transformer_version
    transformer = load_original_transformer(config.pipeline_dir, version, dtype, "cpu")
    transformer.save_pretrained(folder / "transformer", max_shard_size="5GB")
    torch.nn.Module.to(transformer, "meta")  # written: only its class is still needed, for model_index.json
    vae = load_original_vae(config.pipeline_dir, None, "cpu")
    pipeline = load_original_encoders(config.pipeline_dir, vae, dtype, version)
    pipeline.save_pretrained(folder, max_shard_size="5GB")
    pipeline.register_modules(transformer=transformer)
    pipeline.save_config(folder)
