"""The folder layout and the tensor names in which HunyuanVideo-1.5 was first published.

    transformer/480p_i2v   vae   scheduler   text_encoder/llm   text_encoder/byt5-small
    text_encoder/Glyph-SDXL-v2   vision_encoder/siglip

The transformer and the VAE are converted tensor by tensor while they load; sizes are read off the tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch import Tensor

from vflora.errors import UserError
from vflora.models import original_names as names
from vflora.models.lora_formats.fusing import swap_halves
from vflora.models.streamed_weights import WeightFiles, fill, find_shards, read_shapes

_TARGET_SIZES = {"360p": 480, "480p": 640, "720p": 960, "1080p": 1440}
_ROPE_AXES = {128: (16, 56, 56)}
_VAE_NAMES = (
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
_VAE_SETTINGS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "ffactor_spatial": "spatial_compression_ratio",
    "ffactor_temporal": "temporal_compression_ratio",
    "downsample_match_channel": "downsample_match_channel",
    "upsample_match_channel": "upsample_match_channel",
    "scaling_factor": "scaling_factor",
}


@dataclass(frozen=True)
class Version:
    """What the name of a published transformer says about it.

    Attributes:
        name: such as "480p_i2v_step_distilled".
        shift: time shift of its sampling schedule.
        guidance_scale: 1 for distilled ones, which need no second forward.
    """

    name: str

    @property
    def shift(self) -> float:
        """5 at 480p; 7 at 720p and for step-distilled ones; 9 for text to video at 720p."""
        if self.name.startswith("720p_t2v"):
            return 9.0
        return 7.0 if self.name.startswith("720p") or "step_distilled" in self.name else 5.0

    @property
    def guidance_scale(self) -> float:
        """1 for distilled transformers, 6 for the others."""
        return 1.0 if "distilled" in self.name else 6.0


def is_original_layout(folder: str | Path) -> bool:
    """Whether `folder` holds the weights as first published, and not a diffusers pipeline."""
    root = Path(folder)
    return not (root / "model_index.json").is_file() and bool(transformer_versions(root))


def transformer_versions(folder: str | Path) -> list[str]:
    """Lists the transformers in a folder of the original layout."""
    parts = (Path(folder) / "transformer").glob("*/*.safetensors")
    return sorted({part.parent.name for part in parts})


def open_original_transformer(folder: str | Path, version: str) -> tuple[HunyuanVideo15Transformer3DModel, WeightFiles]:
    """Builds a transformer of the original layout without memory, and finds its weights.

    Args:
        folder: the folder that holds `transformer/`.
        version: which of them, such as "480p_i2v".

    Returns:
        The transformer on the meta device, and the files to fill it from.

    Raises:
        UserError: if that version is not there, or its weights are not HunyuanVideo-1.5.
    """
    home = Path(folder) / "transformer" / version
    there = transformer_versions(folder)
    if version not in there:
        raise UserError(
            f"{folder} has no transformer {version}: set --transformer_version to one of {', '.join(there)}, or get "
            "it with `vflora download`."
        )
    shards = find_shards(home)
    settings = transformer_settings(read_shapes(shards), _read_json(home / "config.json"), version)
    with init_empty_weights(include_buffers=False):
        model = HunyuanVideo15Transformer3DModel(**settings)
    return model, WeightFiles(shards, convert_transformer_tensor)


def load_original_transformer(
    folder: str | Path, version: str, dtype: torch.dtype | None, device: torch.device | str
) -> HunyuanVideo15Transformer3DModel:
    """Loads a transformer of the original layout, frozen and in eval mode.

    Args:
        folder: the folder that holds `transformer/`.
        version: which of them, such as "480p_i2v".
        dtype: of the parameters; None keeps that of the files.
        device: where the parameters go.

    Raises:
        UserError: if that version is not there, or its weights are incomplete or not HunyuanVideo-1.5.
    """
    model, files = open_original_transformer(folder, version)
    fill(model, files, dtype, device)
    return model.requires_grad_(False).eval()


def load_original_vae(
    folder: str | Path, dtype: torch.dtype | None, device: torch.device | str
) -> AutoencoderKLHunyuanVideo15:
    """Loads the video VAE of the original layout, frozen and in eval mode.

    Raises:
        UserError: if it is not there, or its weights are incomplete.
    """
    home = Path(folder) / "vae"
    shards = find_shards(home)
    stored = _read_json(home / "config.json")
    if stored.get("shift_factor"):
        raise UserError(
            f"the VAE in {home} shifts its latents, which HunyuanVideo-1.5 does not: use the one it came with."
        )
    settings = {ours: stored[theirs] for theirs, ours in _VAE_SETTINGS.items() if theirs in stored}
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLHunyuanVideo15(**settings)
    fill(vae, WeightFiles(shards, convert_vae_tensor), dtype, device)
    return vae.requires_grad_(False).eval()


def convert_transformer_tensor(key: str, value: Tensor) -> dict[str, Tensor]:
    """Renames one tensor of the transformer; fused projections come out as three, the final modulation swapped."""
    module, _, leaf = key.rpartition(".")
    modules = names.ORIGINAL.modules(module)
    if modules is None:
        return {}
    if modules == (names.SWAPPED_MODULE,):
        value = swap_halves(value)
    parts = value.chunk(len(modules)) if len(modules) > 1 else (value,)
    return {f"{name}.{leaf}": part.contiguous() for name, part in zip(modules, parts, strict=True)}


def convert_vae_tensor(key: str, value: Tensor) -> dict[str, Tensor]:
    """Renames one tensor of the VAE."""
    for pattern, replacement in _VAE_NAMES:
        key = re.sub(pattern, replacement, key)
    return {key: value}


def transformer_settings(shapes: dict[str, tuple[int, ...]], stored: dict[str, Any], version: str) -> dict[str, Any]:
    """Reads the transformer's sizes off its tensors, and the rest off its config.

    Args:
        shapes: original key -> shape.
        stored: the original config.json; may be empty.
        version: name of the transformer, for what the config leaves out.

    Raises:
        UserError: if these are not the tensors of HunyuanVideo-1.5.
    """
    try:
        hidden, channels, patch_t, patch, _ = shapes["img_in.proj.weight"]
        head_dim = shapes["double_blocks.0.img_attn_q_norm.weight"][0]
        settings = {
            "in_channels": channels,
            "out_channels": shapes["final_layer.linear.weight"][0] // (patch_t * patch * patch),
            "num_attention_heads": hidden // head_dim,
            "attention_head_dim": head_dim,
            "num_layers": _count(shapes, "double_blocks"),
            "num_refiner_layers": _count(shapes, "txt_in.individual_token_refiner.blocks"),
            "mlp_ratio": shapes["double_blocks.0.img_mlp.fc1.weight"][0] / hidden,
            "patch_size": patch,
            "patch_size_t": patch_t,
            "text_embed_dim": shapes["txt_in.input_embedder.weight"][1],
            "text_embed_2_dim": shapes["byt5_in.fc1.weight"][1],
            "image_embed_dim": shapes["vision_in.proj.1.weight"][1],
            "use_meanflow": "time_r_in.mlp.0.weight" in shapes,
        }
    except (KeyError, ValueError) as error:
        raise UserError(f"these are not the weights of a HunyuanVideo-1.5 transformer: there is no {error}.") from error
    rope = stored.get("rope_dim_list", _ROPE_AXES.get(head_dim))
    if rope is None:
        raise UserError(f"config.json of {version} has no rope_dim_list, which heads of {head_dim} need: restore it.")
    resolution = stored.get("ideal_resolution") or version.partition("_")[0]
    if resolution not in _TARGET_SIZES:
        raise UserError(
            f"config.json of {version} names no ideal_resolution out of {', '.join(_TARGET_SIZES)}: add it."
        )
    return settings | {
        "rope_axes_dim": tuple(rope),
        "rope_theta": float(stored.get("rope_theta", 256.0)),
        "target_size": _TARGET_SIZES[resolution],
        "task_type": stored.get("ideal_task") or ("t2v" if "t2v" in version else "i2v"),
    }


def _count(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}): download it again.") from error
