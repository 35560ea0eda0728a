"""Ways to fit a pipeline into less memory, or to sample faster, each by a mechanism of diffusers."""

from __future__ import annotations

import importlib.util
import re

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel

from vflora.errors import UserError
from vflora.models.light_decoder import lighten_decoder
from vflora.models.video_vae import patch_frame_attention
from vflora.sampling import Pipeline

SUPPORTED_CACHE = "taylorcache"


def parse_blocks(text: str, count: int, flag: str) -> tuple[int, ...]:
    """Reads block numbers such as "0-53" or "3,7,20-24".

    Args:
        text: numbers and ranges with commas between them.
        count: number of blocks that the transformer has; numbers beyond are left out, since the default ranges are
            those of the full-size model.
        flag: name of the option, for the error.

    Raises:
        UserError: if the text is something else.
    """
    blocks: set[int] = set()
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            raise UserError(f"{flag} {text!r} is no list of blocks: write it like 0-53 or 3,7,20-24.")
        blocks.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(block for block in blocks if block < count))


def place(
    pipeline: Pipeline,
    device: torch.device,
    *,
    offloading: bool,
    group_offloading: bool | None,
    overlap: bool,
    vae_tiling: bool,
) -> None:
    """Puts the pipeline on `device`, whole or piece by piece.

    Args:
        pipeline: loaded, on the CPU if anything is to be offloaded.
        device: where to compute; on the CPU plain offloading has nothing to do.
        offloading: keep each model in main memory until it is its turn.
        group_offloading: bring in one layer at a time instead: the least memory, the most traffic.
        overlap: with group offloading on CUDA, copy the next layer while the present one computes.
        vae_tiling: decode videos larger than 256 x 256 in overlapping tiles; changes the pixels a little.
    """
    if vae_tiling:
        pipeline.vae.enable_tiling()
    if device.type != "cpu":
        # Two thirds of the stock decoder's memory for the same frames, and no S x S mask in its attention.
        patch_frame_attention(pipeline.vae.requires_grad_(False))
        lighten_decoder(pipeline.vae)
    if group_offloading:
        offload_layers(pipeline, device, overlap=overlap)
    elif offloading and device.type != "cpu":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def offload_layers(model: Pipeline | HunyuanVideo15Transformer3DModel, device: torch.device, *, overlap: bool) -> None:
    """Keeps a pipeline or a transformer in main memory and brings in one layer at a time, in place.

    The image encoder comes as a whole: its pooling is torch's MultiheadAttention, which reads the weights of a layer
    inside it without calling that layer, so that nobody would bring them in.

    Args:
        model: on the CPU.
        device: where to compute.
        overlap: on CUDA, copy the next layer while the present one computes.
    """
    overlap = overlap and device.type == "cuda"
    if isinstance(model, HunyuanVideo15Transformer3DModel):
        model.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=overlap)
        return
    model.enable_group_offload(
        onload_device=device, offload_type="leaf_level", use_stream=overlap, exclude_modules="image_encoder"
    )
    if "image_encoder" in model.components:
        apply_group_offloading(
            model.image_encoder, onload_device=device, offload_type="block_level", num_blocks_per_group=1
        )


def cache_steps(
    pipeline: Pipeline,
    *,
    kind: str,
    skip_blocks: str,
    start: int,
    end: int,
    total: int,
    interval: int,
    steps: int,
) -> None:
    """Reuses attention between steps, predicted by its Taylor series (TaylorSeer, arXiv 2503.06923).

    Args:
        pipeline: changed in place; good for one video.
        kind: must be "taylorcache".
        skip_blocks: blocks that always compute, as `parse_blocks` reads them.
        start: first step that may reuse, counted on a schedule of `total` steps.
        end: last such step, counted the same way.
        total: length of the schedule that `start` and `end` refer to.
        interval: every so many steps everything is computed anew.
        steps: steps that will be taken; `start` and `end` scale with it.

    Raises:
        UserError: for another kind of cache.
    """
    if kind != SUPPORTED_CACHE:
        raise UserError(f"--cache_type {kind} is not available here: use --cache_type {SUPPORTED_CACHE}.")
    count = len(pipeline.transformer.transformer_blocks)
    skipped = set(parse_blocks(skip_blocks, count, "--no_cache_block_id"))
    cached = [rf"transformer_blocks\.{block}\.attn" for block in range(count) if block not in skipped]
    if not cached:
        raise UserError(f"--no_cache_block_id {skip_blocks!r} leaves no block to cache: name fewer blocks.")
    pipeline.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=max(1, round(start * steps / total)),
            disable_cache_after_step=round(end * steps / total),
            cache_identifiers=cached,
            taylor_factors_dtype=pipeline.transformer.dtype,
        )
    )


def use_sage_attention(transformer: HunyuanVideo15Transformer3DModel, blocks: str) -> None:
    """Computes the attention of some blocks with the SageAttention kernel.

    The kernel takes no mask, so the transformer must have been made dense.

    Raises:
        UserError: where that package is not installed.
    """
    if importlib.util.find_spec("sageattention") is None:
        raise UserError("--use_sageattn needs a package: `pip install sageattention`, or leave the flag out.")
    layers = transformer.transformer_blocks
    for block in parse_blocks(blocks, len(layers), "--sage_blocks_range"):
        layers[block].attn.processor._attention_backend = "sage"
