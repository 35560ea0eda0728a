"""What generating and comparing share: opening a picture, loading a pipeline, keeping the settings."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline
from PIL import Image

from vflora import acceleration
from vflora.adapters import AdapterInfo, add_adapters, find_adapter
from vflora.config import TORCH_DTYPES
from vflora.data.images import BadImageError, decode
from vflora.errors import UserError
from vflora.models.loading import load_encoders, load_vae, open_transformer, require_complete
from vflora.models.streamed_weights import fill
from vflora.resolution import TARGET_SIZES
from vflora.sampling import Pipeline, keep_prompts, prepare_for_sampling


def open_image(path: str | PathLike[str], flag: str = "--image_path") -> Image.Image:
    """Opens a picture as upright RGB.

    Raises:
        UserError: if it is missing, damaged, too large, or no JPEG, PNG or WebP.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no picture at {path}: check {flag}.")
    try:
        return decode(path.read_bytes())
    except BadImageError as error:
        raise UserError(f"{path} cannot be used ({error}): give another JPEG, PNG or WebP picture.") from error


def load_for_sampling(
    model_path: str,
    transformer_version: str,
    dtype: str,
    device: torch.device | str,
    *,
    waits: bool = False,
    prompts: Iterable[str] | None = None,
    resolution: str | None = None,
) -> Pipeline:
    """Loads an image-to-video pipeline, or a text-to-video one where the folder says that it holds one.

    It comes prepared for sampling, since that has to be done before anything is offloaded.

    Args:
        model_path: folder or hub name.
        transformer_version: which transformer, where there are several.
        dtype: bf16 or fp32.
        device: where it computes.
        waits: leave it in main memory, as what is offloaded is.
        prompts: all that it will be asked for, as `keep_prompts` takes them: they are encoded first, and the text
            encoders are gone before the transformer comes. None keeps the encoders.
        resolution: 480p or 720p, refused if it is not the transformer's; None takes any.

    Raises:
        UserError: if there is no pipeline, it is made for another resolution, or the transformer's weights do not fit
            it; all before anything is read.
    """
    precision, home = TORCH_DTYPES[dtype], torch.device("cpu" if waits else device)
    transformer, files = open_transformer(model_path, transformer_version, precision)
    _check_resolution(transformer.config.target_size, resolution)
    files.require_fit({name: value.shape for name, value in transformer.state_dict().items()})
    if names_text_to_video(model_path):
        require_complete(model_path, "vae", "text_encoder", "text_encoder_2")
        pipeline = HunyuanVideo15Pipeline.from_pretrained(model_path, transformer=None, dtype=precision)
    else:
        pipeline = load_encoders(model_path, load_vae(model_path, precision, home), precision, transformer_version)
    if prompts is not None:
        keep_prompts(pipeline, prompts, torch.device(device))
        gc.collect()  # of the text encoders, whose memory the transformer takes
    fill(transformer, files, precision, home)
    pipeline.register_modules(transformer=transformer)
    pipeline.target_size = transformer.config.target_size
    pipeline.vision_states_dim = transformer.config.image_embed_dim
    prepare_for_sampling(pipeline)
    return pipeline.to(home)


def _check_resolution(target_size: int, resolution: str | None) -> None:
    trained = {size: name for name, size in TARGET_SIZES.items()}.get(target_size)
    if resolution is not None and trained is not None and resolution != trained:
        raise UserError(f"This transformer is made for {trained}: use --resolution {trained}, or load another one.")


def load_with_adapters(
    model_path: str,
    adapters: Sequence[str],
    scales: Sequence[float],
    *,
    transformer_version: str,
    dtype: str,
    device: torch.device,
    offloading: bool,
    group_offloading: bool,
    vae_tiling: bool,
    prompts: Iterable[str] | None = None,
) -> tuple[Pipeline, tuple[AdapterInfo, ...]]:
    """Loads a pipeline, adds its adapters, and puts it where it computes.

    Args:
        model_path: folder or hub name.
        adapters: LoRA files, folders or training checkpoints; all act together.
        scales: strength of each, or one for all.
        transformer_version: which transformer, where there are several.
        dtype: bf16 or fp32.
        device: where to compute.
        offloading: keep each model in main memory until it is its turn.
        group_offloading: bring in one layer at a time instead.
        vae_tiling: decode videos larger than 256 x 256 in overlapping tiles.
        prompts: as `load_for_sampling` takes them.

    Raises:
        UserError: if there is no pipeline, or an adapter cannot be read or does not fit.
    """
    for adapter in adapters:
        find_adapter(adapter)  # a wrong path should show before minutes of loading
    waits = offloading or group_offloading
    pipeline = load_for_sampling(model_path, transformer_version, dtype, device, waits=waits, prompts=prompts)
    added = add_adapters(pipeline.transformer, adapters, scales)
    acceleration.place(
        pipeline, device, offloading=offloading, group_offloading=group_offloading, overlap=True, vae_tiling=vae_tiling
    )
    return pipeline, added


def names_text_to_video(model_path: str) -> bool:
    """Says, without loading anything, whether a folder or hub name holds a text-to-video pipeline."""
    folder = Path(model_path)
    index = folder / "model_index.json"
    if not index.is_file():
        return folder.name.endswith("t2v") and not folder.exists()  # hub names end in what the model does
    return json.loads(index.read_text(encoding="utf-8")).get("_class_name") == HunyuanVideo15Pipeline.__name__


def write_settings(path: Path, config: Any, facts: dict[str, Any]) -> None:
    """Writes a config dataclass, what came out, and the versions used, as JSON."""
    versions = {name: version(name) for name in ("vflora", "torch", "diffusers", "transformers", "peft")}
    content = {"settings": dataclasses.asdict(config), **facts, "versions": versions}
    path.write_text(json.dumps(content, indent=2, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
