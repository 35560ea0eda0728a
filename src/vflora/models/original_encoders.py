"""Text and vision encoders of the original layout, put together as a diffusers pipeline."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video import (
    HunyuanVideo15ImageToVideoPipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    ByT5Tokenizer,
    SiglipImageProcessor,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from vflora.errors import UserError
from vflora.models.original_layout import Version

PARTS = {
    "language model": "text_encoder/llm",
    "byT5 tokenizer": "text_encoder/byt5-small",
    "glyph encoder": "text_encoder/Glyph-SDXL-v2",
    "vision encoder": "vision_encoder/siglip",
}
_GLYPH_PREFIX = "module.text_tower.encoder."


def load_original_encoders(
    folder: str | Path, vae: AutoencoderKLHunyuanVideo15, dtype: torch.dtype, version: str = "480p_i2v"
) -> HunyuanVideo15ImageToVideoPipeline:
    """Loads the encoders on the CPU, frozen, as a pipeline without a transformer, around a loaded VAE.

    Args:
        folder: the folder that holds `text_encoder/` and `vision_encoder/`.
        vae: a loaded VAE.
        dtype: of the encoders' parameters.
        version: name of the transformer, which sets the schedule's shift and the guidance.

    Raises:
        UserError: if a part is missing or damaged.
    """
    root = Path(folder)
    for what, place in PARTS.items():
        if not (root / place).is_dir():
            raise UserError(f"the {what} is missing at {root / place}: `vflora download` prints how to get it.")
    language = AutoModel.from_pretrained(root / "text_encoder/llm", dtype=dtype)
    text_encoder_2, tokenizer_2 = load_glyph_encoder(root, dtype)
    vision = root / "vision_encoder/siglip"
    kind = Version(version)
    pipeline = HunyuanVideo15ImageToVideoPipeline(
        text_encoder=getattr(language, "language_model", language),
        tokenizer=AutoTokenizer.from_pretrained(root / "text_encoder/llm", padding_side="right"),
        transformer=None,  # pyright: ignore[reportArgumentType]
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=kind.shift),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        guider=ClassifierFreeGuidance(guidance_scale=kind.guidance_scale),
        image_encoder=SiglipVisionModel.from_pretrained(vision, subfolder="image_encoder", dtype=dtype),
        feature_extractor=SiglipImageProcessor.from_pretrained(vision, subfolder="feature_extractor"),
    )
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.image_encoder):
        encoder.requires_grad_(False).eval()
    return pipeline


def load_glyph_encoder(root: Path, dtype: torch.dtype) -> tuple[T5EncoderModel, ByT5Tokenizer]:
    """Loads byT5 with the glyph weights, and its tokenizer with the tokens of colours and fonts.

    All weights come from the glyph checkpoint; of byt5-small only settings and the tokenizer are read.

    Raises:
        UserError: if a file is missing or does not fit.
    """
    glyph = root / "text_encoder/Glyph-SDXL-v2"
    byt5 = root / "text_encoder/byt5-small"
    weights = _read_glyph(glyph / "checkpoints/byt5_model.pt")
    tokenizer = ByT5Tokenizer.from_pretrained(byt5)
    tokenizer.add_tokens(_glyph_tokens(glyph / "assets"), special_tokens=True)
    rows = weights["embed_tokens.weight"].shape[0] if "embed_tokens.weight" in weights else 0
    if rows < len(tokenizer):
        raise UserError(
            f"the glyph checkpoint in {glyph} knows {rows} tokens, its tokenizer {len(tokenizer)}: download both again."
        )
    config: Any = T5Config.from_pretrained(byt5)
    config.vocab_size = rows
    encoder = T5EncoderModel(config)
    found = encoder.encoder.load_state_dict(weights, strict=False)
    if found.missing_keys or found.unexpected_keys:
        raise UserError(
            f"the glyph checkpoint in {glyph} does not fit byt5-small: missing {found.missing_keys[:3]}, "
            f"not known {found.unexpected_keys[:3]}; download both again."
        )
    encoder.shared.weight = encoder.encoder.embed_tokens.weight
    encoder.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    return encoder, tokenizer


def _read_glyph(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"the glyph encoder is missing at {path}: `vflora download` prints how to get it.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read safely ({reason}): download it again.") from error
    if "state_dict" not in loaded:
        return loaded
    tower = {key: value for key, value in loaded["state_dict"].items() if key.startswith(_GLYPH_PREFIX)}
    return {key.removeprefix(_GLYPH_PREFIX): value for key, value in tower.items()}


def _glyph_tokens(assets: Path) -> list[str]:
    files = [assets / "color_idx.json", assets / "multilingual_10-lang_idx.json"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: `vflora download` prints how to get the glyph encoder whole.")
    colors, fonts = (json.loads(file.read_text()) for file in files)
    return [f"<color-{i}>" for i in range(len(colors))] + [
        f"<{name[:2]}-font-{number}>" for name, number in fonts.items()
    ]
