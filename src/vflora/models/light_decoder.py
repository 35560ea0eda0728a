"""The VAE's decoder with a backward pass that remembers little: same layers, same weights, same frames.

Between two convolutions of the stock decoder lie a normalisation, an activation and a padding, and autograd keeps
what each of them produced. Here one step runs from the input of the normalisation to the output of the convolution
and keeps that input alone: the rest is cheap to compute again, and a frozen convolution needs nothing for its
backward pass. That is less than half the memory, and the gradient of the padding is a few additions in a fixed
order instead of atomic ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    AutoencoderKLHunyuanVideo15,
    HunyuanVideo15CausalConv3d,
    HunyuanVideo15Decoder3D,
    HunyuanVideo15ResnetBlock,
    HunyuanVideo15RMS_norm,
    HunyuanVideo15Upsample,
)
from torch import Tensor, nn

from vflora.models.compiling import allow_recompiles

_CHUNK = 1 << 27  # elements that uncompiled arithmetic in fp32 works on at a time
_TINY = 1e-12  # of F.normalize


def lighten_decoder(vae: AutoencoderKLHunyuanVideo15, *, compiled: bool = False) -> None:
    """Gives this VAE's decoder the light layers and the memory layout that convolutions like best, in place.

    Args:
        vae: frozen.
        compiled: fuse the arithmetic between the convolutions with torch.compile (GPUs only).
    """
    swaps: dict[type, type] = {
        HunyuanVideo15ResnetBlock: LightResnet,
        HunyuanVideo15Upsample: LightUpsample,
        HunyuanVideo15CausalConv3d: LightConv,
        HunyuanVideo15Decoder3D: LightDecoder,
    }
    for module in vae.decoder.modules():
        if type(module) in swaps:
            module.__class__ = swaps[type(module)]
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        for norm in module.children() if isinstance(module, LightResnet | LightDecoder) else ():
            if isinstance(norm, HunyuanVideo15RMS_norm):
                norm.__class__ = LightNorm
                norm.compiled = compiled  # pyright: ignore[reportArgumentType]


class LightNorm(HunyuanVideo15RMS_norm):
    """A normalisation and the activation behind it, in one pass."""

    compiled: bool

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to silu(norm(x)), of the same shape."""
        return _by_chunks(_norm_silu, self, x)


class LightResnet(HunyuanVideo15ResnetBlock):
    """Two convolutions with their normalisations, and the way around them."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to [B, C', T, H, W]."""
        inner = normed_conv(hidden_states, self.norm1, self.conv1)
        inner = normed_conv(inner, self.norm2, self.conv2)
        around = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        return inner.add_(around)


class LightUpsample(HunyuanVideo15Upsample):
    """Upsampling that hands on the layout the convolutions want."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to twice the height and width, and to 2 T - 1 frames where it works in time."""
        return super().forward(x).contiguous(memory_format=torch.channels_last_3d)


class LightConv(HunyuanVideo15CausalConv3d):
    """A convolution, causal in time, that keeps nothing for its backward pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [B, C, T, H, W] to [B, C', T, H, W]."""
        return cast(Tensor, _PaddedConv.apply(hidden_states, _require_frozen(self.conv)))


class LightDecoder(HunyuanVideo15Decoder3D):
    """The decoder, with its last normalisation and convolution in one step."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps latents [B, C, T, H, W] to frames [B, 3, F, 16 H, 16 W]."""
        x = self.conv_in(hidden_states) + hidden_states.repeat_interleave(repeats=self.repeat, dim=1)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return normed_conv(x, self.norm_out, self.conv_out)


def normed_conv(x: Tensor, norm: LightNorm, conv: HunyuanVideo15CausalConv3d) -> Tensor:
    """Returns conv(silu(norm(x))), keeping x alone for the backward pass."""
    return cast(Tensor, _NormedConv.apply(x, norm, _require_frozen(conv.conv)))


def _require_frozen(conv: nn.Conv3d) -> nn.Conv3d:
    if conv.weight.requires_grad:
        raise ValueError("the light decoder gives its weights no gradient: freeze the VAE (vae.requires_grad_(False))")
    return conv


class _PaddedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, conv: nn.Conv3d) -> Tensor:
        ctx.shape, ctx.conv = x.shape, conv
        return conv(_padded(x))  # called as a module, because offloading hangs its hooks there

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return _input_gradient(grads[0], ctx.shape, ctx.conv), None


class _NormedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, norm: LightNorm, conv: nn.Conv3d) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm, ctx.conv = norm, conv
        return conv(_padded(norm(x)))  # modules both, for the same reason

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        inner = _input_gradient(grads[0], x.shape, ctx.conv)
        return _by_chunks(_norm_silu_gradient, ctx.norm, x, inner), None, None


def _norm_silu(gamma: Tensor, x: Tensor) -> Tensor:
    wide = _wide(x)
    normed = wide / wide.norm(dim=1, keepdim=True).clamp_min(_TINY) * (gamma * x.shape[1] ** 0.5)
    return F.silu(normed).to(x.dtype)


def _norm_silu_gradient(gamma: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    wide = _wide(x)
    length = wide.norm(dim=1, keepdim=True).clamp_min(_TINY)
    unit, weight = wide / length, gamma * x.shape[1] ** 0.5
    normed = unit * weight
    gate = torch.sigmoid(normed)
    inner = _wide(grad) * gate * (1 + normed * (1 - gate)) * weight
    return ((inner - unit * (unit * inner).sum(dim=1, keepdim=True)) / length).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_chunks(function: Callable[..., Tensor], norm: LightNorm, *tensors: Tensor) -> Tensor:
    """Calls `function(gamma, *tensors)`: compiled and whole, or a few frames at a time."""
    tensors = tuple(tensor.detach() for tensor in tensors)  # compiled code is specialised on requires_grad
    x, gamma = tensors[0], _wide(norm.gamma.detach())
    if norm.compiled and x.is_cuda:
        for tensor in tensors:
            torch._dynamo.mark_static(tensor, 1)  # channels: the reduction is unrolled for their number
            for dim in (2, 3, 4):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return _compiled(function)(gamma, *tensors)
    frames = max(1, _CHUNK * x.shape[2] // x.numel())
    if frames >= x.shape[2]:
        return function(gamma, *tensors)
    out = torch.empty_like(x)
    for start in range(0, x.shape[2], frames):
        part = slice(start, start + frames)
        out[:, :, part] = function(gamma, *(tensor[:, :, part] for tensor in tensors))
    return out


_COMPILED: dict[Callable, Callable] = {}


def _compiled(function: Callable) -> Callable:
    if function not in _COMPILED:
        allow_recompiles()
        _COMPILED[function] = torch.compile(function)
    return _COMPILED[function]


def _padded(x: Tensor) -> Tensor:
    """Repeats the edges: one pixel around, and the first frame twice before the first."""
    batch, channels, frames, height, width = x.shape
    out = torch.empty(
        (batch, channels, frames + 2, height + 2, width + 2),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last_3d,
    )
    inner = out[:, :, 2:]
    inner[..., 1:-1, 1:-1] = x
    inner[..., 1:-1, 0], inner[..., 1:-1, -1] = x[..., 0], x[..., -1]
    inner[..., 0, :], inner[..., -1, :] = inner[..., 1, :], inner[..., -2, :]
    out[:, :, :2] = inner[:, :, :1]
    return out


def _input_gradient(grad: Tensor, shape: torch.Size, conv: nn.Conv3d) -> Tensor:
    """Carries a gradient back through a convolution and through the repeated edges before it."""
    batch, channels, frames, height, width = shape
    padded = torch.empty(  # only its shape and layout are looked at
        (batch, channels, frames + 2, height + 2, width + 2),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=torch.channels_last_3d,
    )
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    full, _, _ = torch.ops.aten.convolution_backward(
        grad, padded, conv.weight, None, [1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1, [True, False, False]
    )
    inner = full[:, :, 2:]
    inner[:, :, :1] += full[:, :, :2].sum(dim=2, keepdim=True)
    inner[..., 1, :] += inner[..., 0, :]
    inner[..., -2, :] += inner[..., -1, :]
    inner[..., 1] += inner[..., 0]
    inner[..., -2] += inner[..., -1]
    return inner[..., 1:-1, 1:-1].contiguous(memory_format=torch.channels_last_3d)
