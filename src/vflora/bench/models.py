"""Random models of the true sizes, made in seconds: they show time, memory and rounding, never quality."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import AutoencoderKLHunyuanVideo15
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from vflora.models.identity import FrozenBackbone, IdentityEmbedder, Preprocessing
from vflora.models.projection_head import HeadSpec, new_head
from vflora.models.random_weights import small_dinov3_vit, small_transformer, small_vae
from vflora.random_streams import keyed_generator

M = TypeVar("M", bound=nn.Module)
_POOL = 1 << 26  # distinct random numbers that the weights of the real size are cut from


def build_transformer(size: str, dtype: torch.dtype) -> HunyuanVideo15Transformer3DModel:
    """Builds a frozen transformer in main memory; `real` is HunyuanVideo-1.5's 8.33 B parameters."""
    if size == "small":
        return _moved(small_transformer(), dtype).requires_grad_(False)
    with torch.device("meta"):
        model = HunyuanVideo15Transformer3DModel()
    return _fill(model, dtype)


def build_vae(size: str, dtype: torch.dtype, device: torch.device) -> AutoencoderKLHunyuanVideo15:
    """Builds a frozen VAE on `device`; `real` is the 1.26 B of HunyuanVideo-1.5's."""
    vae = small_vae() if size == "small" else drawn(AutoencoderKLHunyuanVideo15, device)
    return _moved(vae, device, dtype).eval().requires_grad_(False)


def build_embedder(size: str, dtype: torch.dtype, device: torch.device) -> IdentityEmbedder:
    """Builds a frozen DINOv3 with its head on `device`; `real` is a ViT-L/16 at 224 pixels."""
    if size == "small":
        model, pixels, dims = small_dinov3_vit(), 64, (8,)
    else:
        config = DINOv3ViTConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_register_tokens=4,
        )
        model = drawn(lambda: DINOv3ViTModel(config), device)
        pixels, dims = 224, (512, 256)
    backbone = FrozenBackbone(_moved(model, device, dtype), Preprocessing((pixels, pixels)), "of random weights")
    head = new_head(HeadSpec(backbone.width, dims), keyed_generator("head"))
    return IdentityEmbedder(backbone, head.to(device))


def drawn(build: Callable[[], M], device: torch.device) -> M:
    """Builds on `device`, where drawing is quick; the same weights every time, so that two steps can be compared."""
    torch.manual_seed(0)
    with device:
        return build()


def _moved(model: M, *where: Any) -> M:
    nn.Module.to(model, *where)  # modules move in place
    return model


def _fill(model: HunyuanVideo15Transformer3DModel, dtype: torch.dtype) -> HunyuanVideo15Transformer3DModel:
    """Gives a model of the meta device weights in main memory, copied from one pool of random numbers.

    Drawing 8 billion numbers would take minutes; copying them takes seconds. Every matrix starts at its own place of
    the pool and keeps the size of what goes through it; modulations are larger, so that the gates of the blocks
    spread by about a half and rounding inside a block shows.
    """
    pool = torch.randn(_POOL, generator=keyed_generator("weights"))
    pools = {scale: (pool * scale).to(dtype) for scale in (1.0, 10.0)}
    nn.Module.to_empty(model, device="cpu")
    for number, (path, module) in enumerate(model.named_modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.data = torch.full(parameter.shape, 0.0 if name == "bias" else 1.0, dtype=dtype)
                continue
            start = number * 7919 * 64 % (_POOL - parameter.numel())
            values = pools[10.0 if "norm1" in path else 1.0][start : start + parameter.numel()]
            parameter.data = (values * parameter[0].numel() ** -0.5).view(parameter.shape)
    return model.eval().requires_grad_(False)
