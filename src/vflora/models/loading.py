"""The frozen components, from a diffusers folder, a hub name, or a folder of the layout first published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from vflora.errors import UserError
from vflora.model_check import check_json, check_weights
from vflora.models.original_encoders import load_original_encoders
from vflora.models.original_layout import Version, is_original_layout, load_original_vae, open_original_transformer
from vflora.models.streamed_weights import WeightFiles, fill

ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder", "tokenizer", "tokenizer_2", "feature_extractor")
"""Parts of a diffusers pipeline that turn prompts and pictures into conditions."""
_CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "feature_extractor": "preprocessor_config.json",
    "guider": "guider_config.json",
}
HUB_NAME = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"
"""Where the diffusers folder of the model is."""
_HOME = "models/HunyuanVideo-1.5-480p_i2v"
"""Where the documents put it."""


def check_pipeline_dir(pipeline_dir: str) -> None:
    """Checks that `pipeline_dir` is a diffusers folder, one of the original layout, or can be a hub name.

    Raises:
        UserError: if it is none of them, with the command that downloads one.
    """
    folder = Path(pipeline_dir)
    if (folder / "model_index.json").is_file() or is_original_layout(folder):
        return
    if folder.exists():
        raise UserError(
            f"{pipeline_dir} holds neither model_index.json nor transformer/*/*.safetensors, so it is no pipeline: "
            f"get one with `hf download {HUB_NAME} --local-dir {_HOME}`."
        )
    looks_like_hub_name = pipeline_dir.count("/") == 1 and not pipeline_dir.startswith((".", "/", "~"))
    if not looks_like_hub_name or folder.parent.is_dir():
        raise UserError(
            f"There is no model at {pipeline_dir}: correct the name, or get the model with `hf download {HUB_NAME} "
            f"--local-dir {_HOME}`."
        )
    try:
        hf_hub_download(pipeline_dir, "model_index.json")
    except (OSError, ValueError) as error:  # what the hub raises, whether it says no or cannot be reached
        raise UserError(
            f"{pipeline_dir} is no folder here, and no model that the hub gives us ({type(error).__name__}): correct "
            f"the name, or get the model with `hf download {HUB_NAME} --local-dir {_HOME}`."
        ) from error


def require_complete(pipeline_dir: str, *parts: str) -> None:
    """Refuses a diffusers folder whose download was not finished; hub names complete themselves.

    Raises:
        UserError: naming what is missing or damaged, with the command that goes on with the download.
    """
    folder = Path(pipeline_dir)
    if not folder.is_dir():
        return
    advice = f"go on with `hf download {HUB_NAME} --local-dir {pipeline_dir}`"
    for part in parts:
        check_json(folder / part / _CONFIGS.get(part, "config.json"), advice)
        if part not in _CONFIGS:
            check_weights(folder / part, advice)


def require_pipeline(pipeline_dir: str, *parts: str) -> None:
    """Checks, before anything is loaded, that there is a pipeline, and in a diffusers folder the whole of these parts.

    Raises:
        UserError: as `check_pipeline_dir` and `require_complete`.
    """
    check_pipeline_dir(pipeline_dir)
    if not is_original_layout(pipeline_dir):
        require_complete(pipeline_dir, *parts)


def open_transformer(
    pipeline_dir: str, transformer_version: str, dtype: torch.dtype
) -> tuple[HunyuanVideo15Transformer3DModel, WeightFiles]:
    """Builds the frozen transformer without memory, and finds its weights.

    Returns:
        The transformer on the meta device, and the files to fill it from.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        transformer, files = open_original_transformer(pipeline_dir, transformer_version)
    else:
        transformer, files = _open_diffusers_transformer(pipeline_dir)
    nn.Module.to(transformer, dtype)
    return transformer.requires_grad_(False).eval(), files


def _open_diffusers_transformer(pipeline_dir: str) -> tuple[HunyuanVideo15Transformer3DModel, WeightFiles]:
    require_complete(pipeline_dir, "transformer")
    root = pipeline_dir
    if not Path(root).is_dir():
        root = snapshot_download(pipeline_dir, allow_patterns=["transformer/*.json", "transformer/*.safetensors"])
    home = Path(root) / "transformer"
    config = HunyuanVideo15Transformer3DModel.load_config(home)
    with init_empty_weights(include_buffers=False):
        transformer = cast(HunyuanVideo15Transformer3DModel, HunyuanVideo15Transformer3DModel.from_config(config))
    return transformer, WeightFiles(_weight_files(home), lambda key, value: {key: value})


def _weight_files(home: Path) -> list[Path]:
    """Returns the files that diffusers would read; others, of another precision perhaps, may lie beside them."""
    index = home / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return [home / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not (home / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise UserError(f"{home / SAFETENSORS_WEIGHTS_NAME} is missing: give the weights this name.")
    return [home / SAFETENSORS_WEIGHTS_NAME]


def load_transformer(
    pipeline_dir: str, transformer_version: str, dtype: torch.dtype, device: torch.device | str
) -> HunyuanVideo15Transformer3DModel:
    """Loads the frozen transformer.

    Raises:
        UserError: if the folder is missing or no pipeline, or its weights do not fit its configuration.
    """
    transformer, files = open_transformer(pipeline_dir, transformer_version, dtype)
    fill(transformer, files, dtype, device)
    return transformer


def load_patch_size(pipeline_dir: str, transformer_version: str) -> int:
    """Returns the side of the transformer's patches, in latents.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    transformer, _ = open_transformer(pipeline_dir, transformer_version, torch.float32)
    return transformer.config.patch_size


def load_vae(pipeline_dir: str, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLHunyuanVideo15:
    """Loads the frozen video VAE.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return load_original_vae(pipeline_dir, dtype, device)
    require_complete(pipeline_dir, "vae")
    vae = AutoencoderKLHunyuanVideo15.from_pretrained(pipeline_dir, subfolder="vae", dtype=dtype)
    return vae.requires_grad_(False).eval().to(device)


def load_encoders(
    pipeline_dir: str,
    vae: AutoencoderKLHunyuanVideo15,
    dtype: torch.dtype,
    transformer_version: str = "480p_i2v",
) -> HunyuanVideo15ImageToVideoPipeline:
    """Loads text and vision encoders on the CPU, as a pipeline without a transformer, around a loaded VAE.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return load_original_encoders(pipeline_dir, vae, dtype, transformer_version)
    require_complete(pipeline_dir, *ENCODERS)
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(pipeline_dir, transformer=None, vae=vae, dtype=dtype)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.image_encoder):
        encoder.requires_grad_(False).eval()
    return pipeline


def load_guidance_scale(pipeline_dir: str, transformer_version: str = "480p_i2v") -> float:
    """Returns the classifier-free guidance that the pipeline samples with; 1 is none.

    The original layout has it in the version's name.

    Raises:
        UserError: if the folder is missing or no pipeline, or names no guidance.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return Version(transformer_version).guidance_scale
    require_complete(pipeline_dir, "guider")
    try:
        guider = cast(dict[str, Any], ClassifierFreeGuidance.load_config(pipeline_dir, subfolder="guider"))
    except OSError as error:
        raise UserError(f"{pipeline_dir} has no guider ({error}): give --rollout_guidance_scale.") from error
    scale = guider.get("guidance_scale") if guider.get("enabled", True) else 1.0
    if not isinstance(scale, int | float):
        raise UserError(f"The guider of {pipeline_dir} names no guidance_scale: give --rollout_guidance_scale.")
    return float(scale)


def load_shift(pipeline_dir: str, transformer_version: str = "480p_i2v") -> float:
    """Returns the time shift of the pipeline's sampling schedule; the original layout has it in the version's name.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return Version(transformer_version).shift
    require_complete(pipeline_dir, "scheduler")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline_dir, subfolder="scheduler")
    return float(scheduler.config.shift)
