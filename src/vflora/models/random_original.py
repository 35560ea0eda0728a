"""A small random pipeline in the original layout, with the original tensor names, for tests and dry runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5_image2video import (
    HunyuanVideo15ImageToVideoPipeline,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, T5Config, T5EncoderModel

from vflora.models import original_names as names
from vflora.models.lora_formats.fusing import swap_halves
from vflora.models.random_weights import small_pipeline

_COLORS, _FONTS = 3, {"en-Alpha": 0, "cn-Beta": 1}
_VAE_BACK = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.", r".\1.\2.\1sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
)


def write_small_original(
    folder: Path, version: str = "480p_i2v", *, shards: int = 2, seed: int = 0, **transformer_options
) -> HunyuanVideo15ImageToVideoPipeline:
    """Writes a complete small model the way HunyuanVideo-1.5 was first published.

    Args:
        folder: where `transformer/`, `vae/` and the rest go.
        version: name of the transformer.
        shards: number of files the transformer is cut into.
        seed: of all weights.
        transformer_options: passed on to `small_transformer`.

    Returns:
        The same models as a diffusers pipeline, to compare with.
    """
    pipeline = small_pipeline(seed=seed, **transformer_options)
    _write_transformer(pipeline.transformer, folder / "transformer" / version, version, shards)
    _write_vae(pipeline.vae, folder / "vae")
    (folder / "scheduler").mkdir(parents=True)
    (folder / "scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchDiscreteScheduler"}')
    _write_language_model(pipeline, folder / "text_encoder/llm")
    _write_byt5(pipeline, folder / "text_encoder", seed)
    pipeline.image_encoder.save_pretrained(folder / "vision_encoder/siglip/image_encoder")
    pipeline.feature_extractor.save_pretrained(folder / "vision_encoder/siglip/feature_extractor")
    return pipeline


def original_transformer_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names a diffusers state dict the original way; three projections of the refiner become one."""
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        place = names.ORIGINAL.place(module)
        if place is None:
            raise KeyError(module)
        value = swap_halves(value) if module == names.SWAPPED_MODULE else value
        parts.setdefault(f"{place[0]}.{leaf}", {})[place[1]] = value
    return {key: torch.cat([rows[i] for i in sorted(rows)]) for key, rows in parts.items()}


def _write_transformer(transformer, home: Path, version: str, shards: int) -> None:
    home.mkdir(parents=True)
    state = original_transformer_state(transformer.state_dict())
    keys = sorted(state)
    for i in range(shards):
        part = {key: state[key].contiguous() for key in keys[i::shards]}
        save_file(part, home / f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors")
    config = {
        "_class_name": "HunyuanVideo_1_5_DiffusionTransformer",
        "ideal_resolution": version.partition("_")[0],
        "ideal_task": "t2v" if "t2v" in version else "i2v",
        "rope_dim_list": list(transformer.config.rope_axes_dim),
        "rope_theta": transformer.config.rope_theta,
    }
    (home / "config.json").write_text(json.dumps(config))


def _write_vae(vae, home: Path) -> None:
    home.mkdir(parents=True)
    state: dict[str, Tensor] = {}
    for key, value in vae.state_dict().items():
        for pattern, replacement in _VAE_BACK:
            key = re.sub(pattern, replacement, key)
        state[key] = value.contiguous()
    save_file(state, home / "diffusion_pytorch_model.safetensors")
    config = {
        "_class_name": "AutoencoderKLConv3D",
        "latent_channels": vae.config.latent_channels,
        "block_out_channels": list(vae.config.block_out_channels),
        "layers_per_block": vae.config.layers_per_block,
        "ffactor_spatial": vae.config.spatial_compression_ratio,
        "ffactor_temporal": vae.config.temporal_compression_ratio,
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": None,
    }
    (home / "config.json").write_text(json.dumps(config))


def _write_language_model(pipeline, home: Path) -> None:
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=pipeline.text_encoder.config.to_dict(), vision_config=vision)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.model.language_model.load_state_dict(pipeline.text_encoder.state_dict())
    model.save_pretrained(home)
    pipeline.tokenizer.save_pretrained(home)


def _write_byt5(pipeline, home: Path, seed: int) -> None:
    pipeline.tokenizer_2.save_pretrained(home / "byt5-small")
    plain = pipeline.text_encoder_2.config
    plain.save_pretrained(home / "byt5-small")
    (home / "Glyph-SDXL-v2/assets").mkdir(parents=True)
    (home / "Glyph-SDXL-v2/checkpoints").mkdir()
    colors = {f"color {i}": i for i in range(_COLORS)}
    (home / "Glyph-SDXL-v2/assets/color_idx.json").write_text(json.dumps(colors))
    (home / "Glyph-SDXL-v2/assets/multilingual_10-lang_idx.json").write_text(json.dumps(_FONTS))
    torch.manual_seed(seed)
    settings = plain.to_dict() | {"vocab_size": plain.vocab_size + _COLORS + len(_FONTS)}
    glyph = T5EncoderModel(T5Config(**settings)).eval()
    tower = {"module.text_tower.encoder." + key: value for key, value in glyph.encoder.state_dict().items()}
    content = {"epoch": 1, "state_dict": tower | {"module.logit_scale": torch.ones(())}}
    torch.save(content, home / "Glyph-SDXL-v2/checkpoints/byt5_model.pt")
    pipeline.register_modules(text_encoder_2=glyph)
