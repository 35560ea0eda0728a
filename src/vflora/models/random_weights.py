"""Models of the real classes with random weights, at small size for tests and at real size for benchmarks.

Nothing here has learned anything: these models show shapes, speed, memory and exactness, never quality.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from torch.nn import Parameter
from transformers import (
    ByT5Tokenizer,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
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
from vflora.random_streams import keyed_noise

_TEXT, _TEXT_2, _IMAGE = 16, 32, 12
_ROPE_AXES = {8: (2, 2, 4), 16: (4, 6, 6), 32: (8, 12, 12), 128: (16, 56, 56)}


def small_transformer(
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    latent_channels: int = 4,
    patch_size: int = 1,
    target_size: int = 64,
    use_meanflow: bool = False,
    seed: int = 0,
) -> HunyuanVideo15Transformer3DModel:
    """Builds a transformer of a few thousand random parameters."""
    torch.manual_seed(seed)
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * latent_channels + 1,
        out_channels=latent_channels,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=patch_size,
        patch_size_t=1,
        text_embed_dim=_TEXT,
        text_embed_2_dim=_TEXT_2,
        image_embed_dim=_IMAGE,
        rope_axes_dim=_ROPE_AXES[head_dim],
        target_size=target_size,
        task_type="i2v",
        use_meanflow=use_meanflow,
    ).eval()


def small_vae(*, latent_channels: int = 4, seed: int = 0) -> AutoencoderKLHunyuanVideo15:
    """Builds a random VAE with the real ratios: 16 in space, 4 in time."""
    torch.manual_seed(seed)
    return AutoencoderKLHunyuanVideo15(
        latent_channels=latent_channels,
        block_out_channels=(16, 16, 16, 16, 16),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    ).eval()


def small_text_encoder(vocabulary: int, *, seed: int = 0) -> Qwen2_5_VLTextModel:
    """Builds a random Qwen2.5-VL text model of four layers (the pipeline reads the third from the end)."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=_TEXT,
        intermediate_size=_TEXT,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen2_5_VLTextModel(config).eval()


def small_pipeline(*, seed: int = 0, **transformer_options) -> HunyuanVideo15ImageToVideoPipeline:
    """Builds a whole image-to-video pipeline of random weights, without a download.

    Args:
        seed: of all weights.
        transformer_options: passed on to `small_transformer`.
    """
    tokenizer = small_qwen_tokenizer()
    text_encoder = small_text_encoder(len(tokenizer), seed=seed)
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=384, d_model=_TEXT_2, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()
    image_encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=_IMAGE,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).eval()
    return HunyuanVideo15ImageToVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=small_transformer(seed=seed, **transformer_options),
        vae=small_vae(seed=seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        image_encoder=image_encoder,
        feature_extractor=SiglipImageProcessor(size={"height": 28, "width": 28}),
    )


def small_text_to_video() -> HunyuanVideo15Pipeline:
    """Builds the pipeline that has no use for a picture, of the same random parts."""
    parts = small_pipeline().components
    return HunyuanVideo15Pipeline(
        **{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    )


@torch.no_grad()
def randomise_lora(parameters: Iterable[tuple[str, Parameter]], std: float, *, seed: int = 0) -> None:
    """Gives the B factors of a LoRA normal values, as if it had learned; at zero, where they start, it does nothing.

    Args:
        parameters: of a model, by name; all but B factors stay as they are.
        std: of the values.
        seed: of the values.
    """
    for name, parameter in parameters:
        if "lora_B" in name:
            parameter.copy_(std * keyed_noise(tuple(parameter.shape), seed, name))


def small_dinov3_vit(*, hidden_size: int = 16, seed: int = 0) -> DINOv3ViTModel:
    """Builds a random DINOv3 vision transformer of two layers."""
    torch.manual_seed(seed)
    config = DINOv3ViTConfig(
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=16,
        image_size=64,
        num_register_tokens=4,
    )
    return DINOv3ViTModel(config).eval()


def small_dinov3_convnext(*, seed: int = 0) -> DINOv3ConvNextModel:
    """Builds a random DINOv3 ConvNeXt of four blocks."""
    torch.manual_seed(seed)
    config = DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], image_size=64)
    return DINOv3ConvNextModel(config).eval()
