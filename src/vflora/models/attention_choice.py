"""Which attention kernel the transformer's blocks use, and whether its gradient can be trusted on this machine."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15Transformer3DModel,
    HunyuanVideo15TransformerBlock,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vflora.errors import UserError
from vflora.models.speed_config import AttentionKernel
from vflora.random_streams import keyed_generator

logger = logging.getLogger(__name__)

BACKENDS = {
    "native": None,
    "flash": AttentionBackendName._NATIVE_FLASH,
    "cudnn": AttentionBackendName._NATIVE_CUDNN,
    "efficient": AttentionBackendName._NATIVE_EFFICIENT,
}
_MASKLESS = tuple(BACKENDS.values())[1:]
_TOKENS = 1031  # no multiple of any tile
_LIMIT = 0.05


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Attends as the transformer's blocks do.

    diffusers calls the kernel, with two exceptions. It would copy queries, keys and values for cuDNN, which reads them
    as they lie. And the fast kernels take no mask: a batch of texts of unequal length goes to one that does.

    Args:
        query: [B, N, heads, head_dim], as key and value.
        key: of all tokens.
        value: of all tokens.
        mask: which keys are valid, bool [B, N]; None for all.
        backend: of diffusers, or None for its default.
        parallel_config: of diffusers, where processes share a sample whose tokens do not divide evenly.
    """
    if parallel_config is None and mask is None and backend == AttentionBackendName._NATIVE_CUDNN:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return out.transpose(1, 2)
    if mask is not None and backend in _MASKLESS:
        backend = None
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel_config)


def choose_attention(
    transformer: HunyuanVideo15Transformer3DModel, kernel: AttentionKernel, device: torch.device
) -> None:
    """Selects the kernel for the transformer's blocks alone: a switch for the whole process would break the VAE.

    Versions of cuDNN and PyTorch have shipped attention whose forward pass is right and whose gradient is not, so
    on accelerators the kernel is compared with plain arithmetic first.

    Raises:
        UserError: if its output or gradient is wrong on this device.
    """
    config = transformer.config
    shape = (config["num_attention_heads"], config["attention_head_dim"])
    if device.type != "cpu":
        try:
            errors = attention_errors(kernel, *shape, transformer.dtype, device)
        except RuntimeError as error:
            _warn(kernel, shape, transformer.dtype, str(error).splitlines()[0])
            return
        require_true(kernel, errors)
    elif kernel == "cudnn":
        _warn(kernel, shape, transformer.dtype, "it needs a GPU")
        return
    for block in cast(list[HunyuanVideo15TransformerBlock], list(transformer.transformer_blocks)):
        processor = cast(Any, block.attn.processor)
        processor._attention_backend = BACKENDS[kernel]


def require_true(kernel: AttentionKernel, errors: dict[str, float], limit: float = _LIMIT) -> None:
    """Compares what `attention_errors` returned with the most that rounding explains.

    Raises:
        UserError: if one is larger.
    """
    for name, error in errors.items():
        if error <= limit:  # false for a NaN
            continue
        others = " or ".join(f"--attention_backend {other}" for other in BACKENDS if other != kernel)
        raise UserError(
            f"--attention_backend {kernel} computes a wrong {name} on this machine (off by {error:.0%}): use {others}."
        )


def attention_errors(
    kernel: AttentionKernel,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int = _TOKENS,
) -> dict[str, float]:
    """Returns |value - expected| / |expected| of the output and of the gradients of query, key and value.

    Args:
        kernel: called the way the transformer's blocks call it.
        heads: of the attention.
        head_dim: of each head.
        dtype: of the inputs.
        device: where to compute.
        tokens: length of the sequence; plain arithmetic takes tokens^2 numbers of memory, a few times.
    """
    *inputs, wanted = attention_inputs(heads, head_dim, dtype, device, tokens)
    with torch.enable_grad():
        out = attend(*inputs, backend=BACKENDS[kernel])
        values = [out, *torch.autograd.grad(out, inputs, wanted)]
    squares = torch.zeros(2, len(values), device=device)
    for head in range(heads):
        expected = _plain_attention(*(tensor.detach()[0, :, head].float() for tensor in (*inputs, wanted)))
        for number, (value, truth) in enumerate(zip(values, expected, strict=True)):
            squares[0, number] += (value[0, :, head].float() - truth).square().sum()
            squares[1, number] += truth.square().sum()
    names = ("output", "gradient of the queries", "gradient of the keys", "gradient of the values")
    return dict(zip(names, (squares[0] / squares[1]).sqrt().tolist(), strict=True))


def attention_inputs(
    heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns random queries, keys, values, which want gradients, and a gradient of the output [1, N, heads, D]."""
    generator = keyed_generator("attention check")
    query, key, value, wanted = (
        torch.randn(1, tokens, heads, head_dim, generator=generator).to(device, dtype) for _ in range(4)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), wanted


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
    """One head [N, D]: the output, and the gradients of queries, keys and values for that of the output."""
    scale = query.shape[-1] ** -0.5
    weights = (query @ key.mT * scale).softmax(dim=-1)
    inner = wanted @ value.mT
    scores = weights * (inner - (weights * inner).sum(dim=-1, keepdim=True)) * scale
    return weights @ value, scores @ key, scores.mT @ query, weights.mT @ wanted


def _warn(kernel: str, shape: tuple[int, int], dtype: torch.dtype, why: str) -> None:
    name = {"cudnn": "cuDNN", "flash": "flash"}.get(kernel, "PyTorch's")
    logger.warning(
        "%s attention does not run here for %d heads of %d in %s, so PyTorch's own choice is used: %s",
        name,
        *shape,
        dtype,
        why,
    )
