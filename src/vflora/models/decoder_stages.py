"""The VAE's decoder as a list of stages that work on pieces of the frame: on tiles of it, or on a strip.

A convolution looks past the edge of a piece, so a piece comes with margins: what lies around the part that is wanted.
Each layer uses up a pixel of them, and layers at a high resolution are the last and the most expensive. So the
margins are cut down after every stage to what the stages behind it still depend on, and the last ones work on little
more than what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from types import EllipsisType
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import (
    HunyuanVideo15Decoder3D,
    HunyuanVideo15UpBlock3D,
)
from torch import Tensor

from vflora.models.light_decoder import LightDecoder, normed_conv

_RESNET_BORDER = 2  # two 3x3 convolutions
_CONV_BORDER = 1
_CHAINED_BLOCKS = 2  # the last ones: their activations are by far the largest
_SINGLE_STAGE = 4  # how much wider a tile of one earlier stage is: it still keeps less than a tile of the last blocks

_Index = tuple[EllipsisType, slice, slice]
_WHOLE: _Index = (..., slice(None), slice(None))


@dataclass(frozen=True)
class Margins:
    """Pixels of a piece on each side of what is wanted of it.

    They are as wide as the layers to come depend on, or narrower where the frame ends: there the piece ends too, and
    convolutions pad it just as they pad the whole frame.
    """

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    @classmethod
    def along(cls, dim: int, before: int, after: int) -> Margins:
        """Returns margins in one direction: up and down (`dim` -2), or left and right (-1)."""
        return cls(top=before, bottom=after) if dim == -2 else cls(left=before, right=after)

    def beyond(self, border: int) -> Margins:
        """Returns the part of them that is further out than `border`."""
        return Margins(*(max(0, side - border) for side in astuple(self)))

    def within(self, border: int) -> Margins:
        """Returns the part of them that is not."""
        return Margins(*(min(side, border) for side in astuple(self)))

    def scaled(self, scale: int) -> Margins:
        """Returns them in pixels that are `scale` times smaller."""
        return Margins(*(side * scale for side in astuple(self)))

    def cut_off(self, x: Tensor) -> Tensor:
        """Returns `x` [..., H, W] without them."""
        height, width = x.shape[-2:]
        return x[..., self.top : height - self.bottom, self.left : width - self.right] if any(astuple(self)) else x


@dataclass(frozen=True)
class Stage:
    """A run of decoder layers, with what a piece of the frame needs to know.

    Attributes:
        run: maps a piece [B, C, T, H, W] and the margins of what is wanted to the output for what is wanted alone.
        border: input pixels around a piece that its output depends on; None if it depends on the whole frame.
        scale: output pixels per input pixel.
        pixels: pixels of the final frame per input pixel.
    """

    run: Callable[[Tensor, Margins], Tensor]
    border: int | None
    scale: int
    pixels: int


def decoder_stages(decoder: HunyuanVideo15Decoder3D, *, recompute: bool, tile: int | None) -> tuple[list[Stage], Stage]:
    """Splits a decoder where it becomes local in space.

    Args:
        decoder: the stock one or a light one.
        recompute: keep no activations inside the stages and compute them again in the backward pass.
        tile: side of the tiles of the last and largest layers, in pixels of the frame; None for no tiles. Implies
            `recompute`.

    Returns:
        The stages that need the whole frame, and one stage of all that follow.
    """
    blocks = cast(list[HunyuanVideo15UpBlock3D], list(decoder.up_blocks))
    stages = _layers(decoder, blocks)
    if tile is not None:
        # Nothing of whole frames is kept between the largest layers.
        first = len(stages) - 1 - sum(len(b.resnets) + len(b.upsamplers or ()) for b in blocks[-_CHAINED_BLOCKS:])
        single = [_recomputed(stage, tile * _SINGLE_STAGE) for stage in stages[:first]]
        stages = [*single, _recomputed(_chained(stages[first:]), tile)]
    elif recompute:
        stages = [_recomputed(stage, None) for stage in stages]
    local = next(i for i, stage in enumerate(stages) if stage.border is not None)
    return stages[:local], _chained(stages[local:])


def _layers(decoder: HunyuanVideo15Decoder3D, blocks: list[HunyuanVideo15UpBlock3D]) -> list[Stage]:
    def enter(x: Tensor) -> Tensor:
        return decoder.conv_in(x) + x.repeat_interleave(repeats=decoder.repeat, dim=1)

    def leave(x: Tensor) -> Tensor:
        if isinstance(decoder, LightDecoder):
            return normed_conv(x, decoder.norm_out, decoder.conv_out)
        return decoder.conv_out(decoder.conv_act(decoder.norm_out(x)))

    pixels = 2 ** sum(1 for block in blocks if block.upsamplers is not None)
    middle = decoder.mid_block
    stages = [_layer(enter, None, pixels), _layer(middle.resnets[0], None, pixels)]
    for attention, resnet in zip(middle.attentions, list(middle.resnets)[1:], strict=True):
        stages += [_layer(attention, None, pixels), _layer(resnet, None, pixels)]
    for block in blocks:
        stages += [_layer(resnet, _RESNET_BORDER, pixels) for resnet in block.resnets]
        for upsample in block.upsamplers or ():
            stages.append(_layer(upsample, _CONV_BORDER, pixels, scale=2))
            pixels //= 2
    return [*stages, _layer(leave, _CONV_BORDER, pixels)]


def _layer(layer: Callable[[Tensor], Tensor], border: int | None, pixels: int, *, scale: int = 1) -> Stage:
    return Stage(lambda x, margins: margins.scaled(scale).cut_off(layer(x)), border, scale, pixels)


def _chained(stages: Sequence[Stage]) -> Stage:
    """Makes one stage of several that are local, each of which works on as little as those behind it need."""
    border, scale = 0, 1
    needs: list[int] = []  # of each stage, in its input: what the ones behind it need around the piece
    for stage in reversed(stages):
        needs.insert(0, -(-border // stage.scale))
        border = needs[0] + cast(int, stage.border)
        scale *= stage.scale

    def run(x: Tensor, margins: Margins) -> Tensor:
        for stage, need in zip(stages, needs, strict=True):
            x = stage.run(x, margins.beyond(need))
            margins = margins.within(need).scaled(stage.scale)
        return x

    return Stage(run, border, scale, stages[0].pixels)


def _recomputed(stage: Stage, tile: int | None) -> Stage:
    """Makes a stage that keeps nothing but its input and, if it is local, works in tiles."""

    def run(x: Tensor, margins: Margins) -> Tensor:
        return cast(Tensor, _Recomputed.apply(x, margins, stage, tile))

    return Stage(run, stage.border, stage.scale, stage.pixels)


class _Recomputed(torch.autograd.Function):
    """Runs a stage tile by tile without keeping activations; the backward pass runs every tile again.

    One tile's activations are alive at a time, and the gradient is summed in place, which checkpointing of the
    single tiles would not give.
    """

    @staticmethod
    def forward(ctx, x: Tensor, margins: Margins, stage: Stage, tile: int | None) -> Tensor:
        ctx.tiles, ctx.stage = _tiles(x, margins, stage, tile), stage
        ctx.save_for_backward(x)
        out: Tensor | None = None
        for source, around, target in ctx.tiles:
            part = stage.run(x[source], around)
            if len(ctx.tiles) == 1:
                return part
            if out is None:
                height, width = (stage.scale * side for side in margins.cut_off(x).shape[3:])
                out = part.new_empty(*part.shape[:3], height, width)
            out[target] = part
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), stage, (grad,) = ctx.saved_tensors, ctx.stage, grads
        total: Tensor | None = None
        for source, around, target in ctx.tiles:
            part = x[source].detach().requires_grad_(True)
            with torch.enable_grad():
                out = stage.run(part, around)
            (part_grad,) = torch.autograd.grad(out, part, grad[target])
            if part.shape == x.shape and len(ctx.tiles) == 1:
                return part_grad, None, None, None
            if total is None:
                total = torch.zeros_like(x)
            total[source] += part_grad
        return cast(Tensor, total), None, None, None


def _tiles(x: Tensor, margins: Margins, stage: Stage, tile: int | None) -> list[tuple[_Index, Margins, _Index]]:
    """Lists, for every tile of what is wanted, the index of its input, its margins there, and where its output goes."""
    if tile is None or stage.border is None:
        return [(_WHOLE, margins, _WHOLE)]
    side = max(1, tile // stage.pixels)
    height, width = x.shape[3:]
    return [
        ((..., y, x), Margins(top, bottom, left, right), (..., to_y, to_x))
        for y, (top, bottom), to_y in _spans(height, margins.top, margins.bottom, side, stage)
        for x, (left, right), to_x in _spans(width, margins.left, margins.right, side, stage)
    ]


def _spans(
    size: int, before: int, after: int, side: int, stage: Stage
) -> Iterator[tuple[slice, tuple[int, int], slice]]:
    border = cast(int, stage.border)
    for start, end in pairwise([*range(before, size - after, side), size - after]):
        first, last = max(0, start - border), min(size, end + border)
        target = slice((start - before) * stage.scale, (end - before) * stage.scale)
        yield slice(first, last), (start - first, last - end), target
