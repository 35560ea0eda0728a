"""The miniature world's models: the real classes, small enough to ship with the package and to run on two cores.

All parts together have at most 19 million parameters, 38 MB in bf16. A quarter of that is the byT5 projection of
the transformer, whose hidden width of 2,048 diffusers fixes; no prompt of the world quotes text, so it stays unused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from vflora.models.small_tokenizer import small_qwen_tokenizer
from vflora.world.scenes import VOCABULARY

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WorldSizes:
    """Every size of the world's models.

    Attributes:
        frame_size: height and width of a clip in pixels.
        frames: frames of a clip, 4n+1.
        latent_channels: of the VAE, which packs 4 x 4 pixels and 4 frames into one position. With 8 channels the
            creatures' faces wash out; 16 keep them.
        vae_channels: width of the VAE at full, half and quarter resolution.
        vae_layers: residual blocks per level of the encoder; the decoder has one more.
        heads: attention heads of the transformer.
        head_dim: width of a head, divided among time, height and width by `rope_axes`.
        rope_axes: as said.
        layers: transformer blocks.
        mlp_ratio: hidden width of the feed-forward layers over the model's width.
        text_width: width of the Qwen text encoder.
        glyph_width: width of byT5.
        vision_width: width of SigLIP.
        dino_width: width of DINOv3.
        dino_layers: blocks of DINOv3.
        shift: time shift of the sampling schedule; 320 tokens need less of it than real videos.
        guidance_scale: classifier-free guidance when sampling.
    """

    frame_size: int = 64
    frames: int = 17
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (32, 64, 64)
    vae_layers: int = 1
    heads: int = 6
    head_dim: int = 32
    rope_axes: tuple[int, int, int] = (8, 12, 12)
    layers: int = 8
    mlp_ratio: float = 2.0
    text_width: int = 64
    glyph_width: int = 32
    vision_width: int = 64
    dino_width: int = 128
    dino_layers: int = 6
    shift: float = 3.0
    guidance_scale: float = 3.0


def build_vae(sizes: WorldSizes, seed: int) -> AutoencoderKLHunyuanVideo15:
    """Builds an untrained VAE: 4 x in space, 4 x in time.

    The last convolution of every residual branch starts at zero, so that training starts from the network's
    shortcuts, which already carry pixels to latents and back; and the encoder starts sure of itself (a small
    posterior variance), or its noise would drown what the latents say.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=sizes.latent_channels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=sizes.vae_layers,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        scaling_factor=1.0,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2.conv") and isinstance(module, nn.Conv3d) and module.bias is not None:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    log_variance = cast(Tensor, vae.encoder.conv_out.conv.bias)[sizes.latent_channels :]
    nn.init.constant_(log_variance, -6.0)
    return vae


def build_transformer(sizes: WorldSizes, seed: int) -> HunyuanVideo15Transformer3DModel:
    """Builds an untrained transformer.

    Modulation and output start at zero (adaLN-Zero of Peebles & Xie 2022, arXiv 2212.09748, section 3.2). So does
    the byT5 projection, which stays there: a prompt of the world quotes nothing, and zeros compress well.
    """
    torch.manual_seed(seed)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * sizes.latent_channels + 1,
        out_channels=sizes.latent_channels,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        num_layers=sizes.layers,
        num_refiner_layers=1,
        mlp_ratio=sizes.mlp_ratio,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=sizes.text_width,
        text_embed_2_dim=sizes.glyph_width,
        image_embed_dim=sizes.vision_width,
        rope_axes_dim=sizes.rope_axes,
        target_size=sizes.frame_size,
        task_type="i2v",
    )
    zeroed = [transformer.proj_out, transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    for layer in [*zeroed, *transformer.context_embedder_2.children()]:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    return transformer


def build_text_encoder(sizes: WorldSizes, vocabulary: int, seed: int) -> Qwen2_5_VLTextModel:
    """Builds the frozen, random text encoder: words get embeddings of unit variance, so that no two look alike."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=sizes.text_width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    encoder = Qwen2_5_VLTextModel(config)
    nn.init.normal_(encoder.embed_tokens.weight)
    return encoder


def build_image_encoder(sizes: WorldSizes, seed: int) -> SiglipVisionModel:
    """Builds the frozen, random SigLIP: sixteen tokens, each a projection of its patch and its surroundings."""
    torch.manual_seed(seed)
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=sizes.vision_width,
            num_hidden_layers=1,
            num_attention_heads=4,
            image_size=sizes.frame_size,
            patch_size=sizes.frame_size // 4,
        )
    )


def build_pipeline(
    sizes: WorldSizes,
    vae: AutoencoderKLHunyuanVideo15,
    transformer: HunyuanVideo15Transformer3DModel,
    seed: int,
) -> HunyuanVideo15ImageToVideoPipeline:
    """Puts the pipeline together around a VAE and a transformer; the text and image encoders are made from `seed`.

    The encoders are rounded to bf16, as they are stored, so that training sees what users load.
    """
    tokenizer = small_qwen_tokenizer(VOCABULARY)
    torch.manual_seed(seed)
    glyph_encoder = T5EncoderModel(
        T5Config(vocab_size=384, d_model=sizes.glyph_width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    encoders = {
        "text_encoder": build_text_encoder(sizes, len(tokenizer), seed),
        "text_encoder_2": glyph_encoder,
        "image_encoder": build_image_encoder(sizes, seed),
    }
    side = {"height": sizes.frame_size, "width": sizes.frame_size}
    return HunyuanVideo15ImageToVideoPipeline(
        **{name: _as_stored(module) for name, module in encoders.items()},
        tokenizer=tokenizer,
        tokenizer_2=ByT5Tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=sizes.shift),
        guider=ClassifierFreeGuidance(guidance_scale=sizes.guidance_scale),
        feature_extractor=SiglipImageProcessor(size=side),
    )


def _as_stored(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False).bfloat16().float()


def build_dino(sizes: WorldSizes, seed: int) -> DINOv3ViTModel:
    """Builds an untrained DINOv3 vision transformer of 8 x 8 patches."""
    torch.manual_seed(seed)
    config = DINOv3ViTConfig(
        hidden_size=sizes.dino_width,
        intermediate_size=3 * sizes.dino_width,
        num_hidden_layers=sizes.dino_layers,
        num_attention_heads=4,
        patch_size=8,
        image_size=sizes.frame_size,
        num_register_tokens=4,
    )
    return DINOv3ViTModel(config)


def save_dino(dino: DINOv3ViTModel, folder: Path) -> None:
    """Writes DINOv3 in bf16, with the preprocessing file that its users read sizes and colours from."""
    dino.to(torch.bfloat16).save_pretrained(folder)
    preprocessing = {
        "do_resize": True,
        "size": {"height": dino.config.image_size, "width": dino.config.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")
