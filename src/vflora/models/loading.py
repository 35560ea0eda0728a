"""The frozen components, from a diffusers folder, a hub name, or a folder of the layout first published."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
)

from vflora.errors import UserError
from vflora.models.original_encoders import load_original_encoders
from vflora.models.original_layout import Version, is_original_layout, load_original_transformer, load_original_vae

LICENCE_NOTE = (
    "HunyuanVideo-1.5 weights are under the Tencent Hunyuan Community License (not for use in the EU, UK and South "
    "Korea; read it before you share what you train)."
)
_HUB_NAME = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v"


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
            f"get one with `hf download {_HUB_NAME} --local-dir {pipeline_dir}`."
        )
    looks_like_hub_name = pipeline_dir.count("/") == 1 and not pipeline_dir.startswith((".", "/", "~"))
    if not looks_like_hub_name:
        raise UserError(
            f"--pipeline_dir {pipeline_dir} does not exist: "
            f"get the model with `hf download {_HUB_NAME} --local-dir {pipeline_dir}`."
        )


def load_transformer(
    pipeline_dir: str, transformer_version: str, dtype: torch.dtype, device: torch.device | str
) -> HunyuanVideo15Transformer3DModel:
    """Loads the frozen transformer.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return load_original_transformer(pipeline_dir, transformer_version, dtype, device)
    transformer = HunyuanVideo15Transformer3DModel.from_pretrained(pipeline_dir, subfolder="transformer", dtype=dtype)
    return transformer.requires_grad_(False).eval().to(device)


def load_vae(pipeline_dir: str, dtype: torch.dtype, device: torch.device | str) -> AutoencoderKLHunyuanVideo15:
    """Loads the frozen video VAE.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return load_original_vae(pipeline_dir, dtype, device)
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
    pipeline = HunyuanVideo15ImageToVideoPipeline.from_pretrained(pipeline_dir, transformer=None, vae=vae, dtype=dtype)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.image_encoder):
        encoder.requires_grad_(False).eval()
    return pipeline


def load_pipeline(
    pipeline_dir: str, transformer_version: str, dtype: torch.dtype, device: torch.device | str
) -> HunyuanVideo15ImageToVideoPipeline:
    """Loads everything that generation needs, on `device`.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    vae = load_vae(pipeline_dir, dtype, device)
    pipeline = load_encoders(pipeline_dir, vae, dtype, transformer_version)
    transformer = load_transformer(pipeline_dir, transformer_version, dtype, device)
    pipeline.register_modules(transformer=transformer)
    pipeline.target_size = transformer.config.target_size
    pipeline.vision_states_dim = transformer.config.image_embed_dim
    return pipeline.to(device)


def load_shift(pipeline_dir: str, transformer_version: str = "480p_i2v") -> float:
    """Returns the time shift of the pipeline's sampling schedule; the original layout has it in the version's name.

    Raises:
        UserError: if the folder is missing or no pipeline.
    """
    check_pipeline_dir(pipeline_dir)
    if is_original_layout(pipeline_dir):
        return Version(transformer_version).shift
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(pipeline_dir, subfolder="scheduler")
    return float(scheduler.config.shift)
