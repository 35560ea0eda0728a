"""Frozen weights in 8 bits: to take half the memory, or to multiply at twice the rate.

Storage. Every output row of a weight is kept as int8 or float8 codes with one fp32 scale, and becomes a full matrix
again only while its layer runs. The matrix units still see 16 bits. Student and teacher share the codes, so a LoRA
at zero still equals its teacher exactly; what changes is the base model, by the rounding of its weights.

Multiplication. In the teacher's rollouts both sides of the product may be float8 (e4m3), with one scale per token
and one per output row (Micikevicius et al. 2022, arXiv 2209.05433, section 3). A rollout only has to pass through
likely states; the predictions that the student is held to are made in full precision: `vflora.models.fast_teacher`.

Both act on the layers inside the transformer's blocks, after the LoRA has been added, because peft takes the
precision of its own weights from the layer that it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from torch import Tensor, nn

from vflora.errors import UserError

CODES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_FP8 = torch.float8_e4m3fn


@dataclass
class Fp8Switch:
    """Whether the layers that share this switch multiply in float8 right now."""

    on: bool = field(default=False)

    @contextmanager
    def turned_on(self) -> Iterator[None]:
        """Inside, they do."""
        before, self.on = self.on, True
        try:
            yield
        finally:
            self.on = before


def quantize_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds every row of `values` to codes of `dtype` times a scale.

    Args:
        values: [..., N], floating.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Codes of the same shape, and scales [..., 1], fp32, so that `codes * scale` approximates `values`.
    """
    values = values.float()
    # Times the reciprocal, which is how CUDA divides by a number, so that every device finds the same bits.
    scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) * (1 / _LARGEST[dtype])
    scaled = values / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


class FrozenLinear(nn.Module):
    """A frozen nn.Linear whose weight is stored in 8 bits, multiplied in 8 bits, or both.

    It has no parameters, so nothing can train it and no optimizer or sharding sees it. Never cast it with
    `.to(dtype)`: that would turn float8 codes into numbers of that type.
    """

    weight: Tensor | None
    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, codes: torch.dtype, *, keep_weight: bool, switch: Fp8Switch | None):
        """Takes over `linear`.

        Args:
            linear: the layer.
            codes: int8 or float8_e4m3fn; multiplication needs the latter.
            keep_weight: keep the full weight too, for the products in full precision.
            switch: says when to multiply in float8; None for never.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.switch = switch
        weight = linear.weight.detach()
        stored, scale = quantize_rows(weight, codes)
        self.register_buffer("weight", weight if keep_weight else None)
        self.register_buffer("codes", stored)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        if self.switch is not None and self.switch.on:
            return _fp8_linear(x, self.codes, self.scale, self.bias)
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        product = _StoredProduct.apply(x, self.codes, self.scale)
        return product if self.bias is None else product + self.bias


class _StoredProduct(torch.autograd.Function):
    """x W^T with W = codes * scale; the backward pass rebuilds W instead of keeping it."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return F.linear(x, restored(codes, scale, x.dtype))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ restored(codes, scale, grad.dtype), None, None


def restored(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns codes * scale in `dtype`: the inverse of `quantize_rows`, up to its rounding."""
    if codes.dtype != torch.int8 or torch.compiler.is_compiling():
        return (codes.float() * scale).to(dtype)
    # The same numbers in one pass over the codes, without two fp32 matrices on the way.
    return torch.mul(codes, scale, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))


def _fp8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    x_codes, x_scale = quantize_rows(rows, _FP8)
    if x.device.type != "cuda":  # the same products of the same codes, in fp32
        out = F.linear(x_codes.float() * x_scale, codes.float() * scale).to(x.dtype)
        out = out if bias is None else out + bias
    else:
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            x_codes, codes.t(), x_scale, scale.t(), bias=bias, out_dtype=x.dtype, use_fast_accum=True
        )
    return out.unflatten(0, x.shape[:-1])


def check_fp8(device: torch.device) -> None:
    """Raises UserError if the GPU has no float8 matrix units; the CPU computes the same numbers slowly."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"--rollout_precision fp8 needs a GPU with float8 matrix units (Ada, Hopper or newer), which the {name} "
            "does not have: use --rollout_precision full."
        )


def quantize_blocks(
    transformer: HunyuanVideo15Transformer3DModel,
    *,
    storage: str = "full",
    fp8_rollouts: bool = False,
    device: torch.device | None = None,
    home: torch.device | None = None,
) -> Fp8Switch:
    """Replaces the Linear layers inside the transformer's blocks, in place, one at a time.

    Call it after the LoRA has been added. The transformer may still lie on the CPU: each weight visits `device`
    alone, to be rounded, and only what is kept of it stays there, so a model that would not fit there in 16 bits can
    be placed.

    Args:
        transformer: frozen but for its LoRA.
        storage: full, int8 or fp8.
        fp8_rollouts: lets the returned switch turn float8 multiplication on, in the feed-forward layers of the
            video tokens: on an H200, products of 2048 x 2048 with a scale per row gain nothing from float8 (717
            against 749 TFLOP/s, quantizing not counted), those of 2048 x 8192 go from 773 to 1,442.
        device: where weights are rounded, which accelerators do in a moment; where they are by default.
        home: where the new layers go; `device` by default.

    Returns:
        The switch, off.

    Raises:
        UserError: for float8 multiplication with int8 storage.
    """
    switch = Fp8Switch()
    if fp8_rollouts and storage == "int8":
        raise UserError("--rollout_precision fp8 cannot multiply int8 weights: use --weight_storage fp8 or full.")
    codes = CODES.get(storage, _FP8)
    for block in transformer.transformer_blocks:
        for name, layer in list(block.named_modules()):
            multiplied = fp8_rollouts and name.startswith("ff.")
            if not isinstance(layer, nn.Linear) or "lora_" in name or not (multiplied or storage in CODES):
                continue
            if device is not None:
                layer.to(device)
            parent, _, child = name.rpartition(".")
            frozen = FrozenLinear(layer, codes, keep_weight=storage not in CODES, switch=switch if multiplied else None)
            if home is not None:
                frozen.to(home)
            setattr(block.get_submodule(parent), child, frozen)
    return switch
