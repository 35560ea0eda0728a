"""`vflora convert-lora`: a LoRA file of one program as a file of another."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from vflora.atomic import require_writable
from vflora.errors import UserError
from vflora.models.lora_formats import (
    LoraFormat,
    LoraModule,
    LoraWeights,
    is_dcp,
    lora_file,
    read_lora,
    read_reference_dcp,
    write_lora,
)

log = logging.getLogger(__name__)

_REFERENCE_ALPHA = 16.0


@dataclass(frozen=True)
class ConvertLoraConfig:
    """Which LoRA, and for which program."""

    input_path: Path
    """A LoRA file of any format, its folder, or a sharded checkpoint (checkpoint-1000) of the reference."""
    output_path: Path
    """The file to write, ending in .safetensors, or a folder to put it into."""
    format: LoraFormat = "comfyui"
    """diffusers, comfyui, kohya or original: the program that will read it."""
    lora_alpha: float | None = None
    """Alpha of the training run, for files that do not record it; a sharded checkpoint counts as 16 without it."""


def run(config: ConvertLoraConfig) -> Path:
    """Converts the file; what the LoRA does to the model stays the same.

    Returns:
        The file written.

    Raises:
        UserError: if the input cannot be read, or the output would overwrite it or has no folder to be in.
    """
    if config.input_path.resolve() == config.output_path.resolve():
        raise UserError(f"{config.output_path} is the input itself: give another output.")
    require_writable(lora_file(config.output_path).parent, "--output_path")
    weights = _read(config)
    file = write_lora(weights, config.output_path, config.format)
    log.info("wrote %s for %s: %d layers, rank %d", file, config.format, len(weights), weights.rank)
    return file


def _read(config: ConvertLoraConfig) -> LoraWeights:
    if is_dcp(config.input_path):
        return read_reference_dcp(config.input_path, config.lora_alpha or _REFERENCE_ALPHA)
    weights = read_lora(config.input_path)
    if config.lora_alpha is None:
        return weights
    if any(update.scale != 1.0 for update in weights.modules.values()):
        raise UserError(f"{config.input_path} records its own alpha ({weights.alpha:g}): leave --lora_alpha out.")
    factor = config.lora_alpha / weights.rank
    modules = {name: LoraModule(m.down, m.up, m.alpha * factor) for name, m in weights.modules.items()}
    return LoraWeights(modules, weights.metadata)
