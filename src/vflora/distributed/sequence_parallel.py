"""Several processes on one sample: each holds a part of its tokens, and for attention a part of the heads.

Ulysses (Jacobs et al. 2023, arXiv 2309.14509), by diffusers' context parallelism. The model has no plan for it, so
here is one for the dense forward pass. Text and video enter the first block split, and the velocity leaves whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15Transformer3DModel
from diffusers.utils import logging as diffusers_logging

from vflora.distributed.world import World

_ROTARY = ContextParallelInput(split_dim=0, expected_dims=2, split_output=True)
_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3)
_PLAN = {
    "rope": {0: _ROTARY, 1: _ROTARY},
    "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
    "transformer_blocks.*": {"attention_mask": ContextParallelInput(split_dim=1, expected_dims=2)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def enable_context_parallel(transformer: HunyuanVideo15Transformer3DModel, world: World) -> None:
    """Splits every forward pass over the processes that share a sample, in place.

    The sum of their gradients is the gradient. Call it after `make_dense`, sharding and compiling.

    Args:
        transformer: with the dense forward pass, which pads the text to a length that divides.
        world: the processes; with `sp_size` 1 nothing changes.
    """
    if world.sp_size == 1:
        return
    config = ContextParallelConfig(ulysses_degree=world.sp_size, mesh=world.mesh)
    with _quietly(), _some_accelerator():
        transformer.enable_parallelism(config=config, cp_plan=dict(_PLAN))
    # Said by torch 2.13 to diffusers 0.42 in every forward pass.
    warnings.filterwarnings("ignore", ".*all_gather_tensor` is deprecated", FutureWarning)


@contextmanager
def _quietly() -> Iterator[None]:
    """Spares the user the remark that this part of diffusers is young, which our tests watch for."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(before)


@contextmanager
def _some_accelerator() -> Iterator[None]:
    """Lets diffusers number the devices of a machine that has none: it divides by how many there are."""
    count = torch.accelerator.device_count
    if count() == 0:
        torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = count
