"""One video by several processes: each computes with a part of its tokens (context parallelism).

The first process holds the pipeline and writes the video; the others hold a transformer each. What every process
does to its transformer must be the same, and comes from here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from PIL import Image

from vflora import acceleration
from vflora.adapters import add_adapters
from vflora.config import TORCH_DTYPES
from vflora.devices import torch_device
from vflora.distributed.divisible import require_divisible
from vflora.distributed.lending import lend
from vflora.distributed.processes import World
from vflora.distributed.sequence_parallel import enable_context_parallel
from vflora.errors import UserError
from vflora.generate_config import GenerateConfig
from vflora.models.dense_attention import make_dense
from vflora.models.loading import load_transformer
from vflora.models.speed import compile_blocks
from vflora.sampling import Pipeline, fit_image, video_size


def require_shareable(config: GenerateConfig, world: World) -> None:
    """Refuses settings that several processes cannot share.

    Raises:
        UserError: with the way out.
    """
    if world.size > 1 and config.enable_cache:
        raise UserError(
            f"--enable_cache does not go with {world.size} processes, which share every step: drop it, or start "
            "one process."
        )


def video_tokens(pipeline: Pipeline, image: Image.Image | None, aspect: float, frames: int) -> int:
    """Returns how many tokens a video has.

    Args:
        pipeline: that will make it.
        image: its first frame, whose aspect counts, if there is one.
        aspect: width over height otherwise.
        frames: 4n + 1.
    """
    if image is None:
        height, width = video_size(pipeline, aspect)
    else:
        width, height = fit_image(pipeline, image).size
    vae, config = pipeline.vae, pipeline.transformer.config
    times = ((frames - 1) // vae.temporal_compression_ratio + 1) // config.patch_size_t
    rows, columns = (side // vae.spatial_compression_ratio // config.patch_size for side in (height, width))
    return times * rows * columns


def share(transformer: HunyuanVideo15Transformer3DModel, tokens: Callable[[], int], world: World) -> None:
    """Splits every forward pass over the processes, in place; all of them call it with everything else set up.

    Args:
        transformer: dense, with its adapters.
        tokens: returns the tokens of the video; called on the first process.
        world: the processes; alone, nothing changes.

    Raises:
        UserError: if the attention heads do not divide by the processes, with the numbers that work.
    """
    if world.size == 1:
        return
    require_divisible(
        heads=transformer.config["num_attention_heads"], tokens={}, sp_size=world.size, flag="--nproc_per_node"
    )
    count = world.from_main(tokens)
    enable_context_parallel(transformer, world, uneven=count % world.size != 0)


def work_for_the_first(config: GenerateConfig, world: World) -> None:
    """What the processes besides the first do: load the transformer alone, and compute when the first one does.

    Raises:
        UserError: whatever any process refuses.
    """
    device = torch_device(config.device)

    def prepare() -> HunyuanVideo15Transformer3DModel:
        transformer = load_transformer(config.model_path, config.version, TORCH_DTYPES[config.dtype], "cpu")
        add_adapters(
            transformer,
            config.adapter_paths,
            config.lora_scale,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            targets=config.lora_target_modules,
        )
        make_dense(transformer)
        quicken(transformer, config)
        if config.group_offloading:
            acceleration.offload_layers(transformer, device, overlap=config.overlap_group_offloading)
        else:
            torch.nn.Module.to(transformer, device)
        return transformer

    transformer = world.everywhere(prepare)
    share(transformer, lambda: 0, world)
    lend(transformer, world, device)


def quicken(transformer: HunyuanVideo15Transformer3DModel, config: GenerateConfig) -> None:
    """Attention kernel and compilation, as the flags say; the transformer must be dense."""
    if config.use_sageattn:
        acceleration.use_sage_attention(transformer, config.sage_blocks_range)
    if config.enable_torch_compile:
        compile_blocks(transformer)
